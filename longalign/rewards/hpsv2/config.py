"""Config of the reward `hpsv2`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.errors import ConfigProblem
from longalign.hub import availability_problem
from longalign.rewards.config import Aspect, TowerRewardConfig


class Hpsv2Config(TowerRewardConfig):
    """HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): CLIP ViT-H-14, fine-tuned on human preferences.

    The score is the cosine similarity of image and text embedding. Requires the package open_clip_torch.
    """

    target: ClassVar[str] = "longalign.rewards.hpsv2.reward:Hpsv2Reward"

    name: Literal["hpsv2"] = "hpsv2"
    checkpoint: str = "xswu/HPSv2"
    """Hub id, path of a ``.pt`` file, or folder with ``HPS_v2_compressed.pt`` or ``HPS_v2.1_compressed.pt``. The folder
    of the weights may also contain ``open_clip_config.json`` for an architecture other than ViT-H-14, and
    ``bpe_simple_vocab.txt.gz`` for a vocabulary other than CLIP's.
    """
    revision: str | None = None
    """branch, tag or commit of the Hub repository; null: its main branch. Not allowed with a local path."""
    version: Literal["v2", "v2.1"] | None = None
    """which weights in the Hub repository or folder are used; null: ``"v2.1"``. Not allowed with a ``.pt`` file."""
    aspect: Aspect = "pad"

    def check_files(self) -> list[ConfigProblem]:
        problem = availability_problem(self.checkpoint, self.revision)
        return [("checkpoint", problem)] if problem else []
