"""Config of the reward `hpsv2`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.errors import ConfigProblem
from longalign.hub import availability_problem
from longalign.rewards.config import Aspect, TowerRewardConfig


class Hpsv2Config(TowerRewardConfig):
    """HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341). Requires open_clip."""

    target: ClassVar[str] = "longalign.rewards.hpsv2.reward:Hpsv2Reward"

    name: Literal["hpsv2"] = "hpsv2"
    checkpoint: str = "xswu/HPSv2"
    """Hub id, a ``.pt`` file, or a folder with a ``.pt`` file. Optional files in the folder of
    the weights: ``open_clip_config.json`` for an architecture other than ViT-H-14, and ``bpe_simple_vocab.txt.gz`` for
    a vocabulary other than CLIP's.
    """
    revision: str | None = None
    """branch, tag or commit of the Hub repository."""
    version: Literal["v2", "v2.1"] | None = None
    """version of the weights in the Hub repository or folder; null: ``"v2.1"``. Not allowed with a ``.pt`` file."""
    aspect: Aspect = "pad"

    def check_files(self) -> list[ConfigProblem]:
        problem = availability_problem(self.checkpoint, self.revision)
        return [("checkpoint", problem)] if problem else []
