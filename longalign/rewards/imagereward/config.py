"""Config of the reward `imagereward`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, checkpoint_problem
from longalign.rewards.config import Aspect, RewardConfig


class ImageRewardConfig(RewardConfig):
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP, fine-tuned on human preferences.

    It reads the first 33 tokens of a prompt and warns about longer prompts. To score a longer prompt sentence by
    sentence, wrap this reward in the reward ``segments``.
    """

    target: ClassVar[str] = "longalign.rewards.imagereward.reward:ImageRewardReward"

    name: Literal["imagereward"] = "imagereward"
    checkpoint: str = "THUDM/ImageReward"
    """Hub id or local folder with ``ImageReward.pt`` and ``med_config.json``."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository of ``checkpoint``; null: its main branch."""
    tokenizer: str | None = None
    """Hub id or local folder of the tokenizer. null: ``checkpoint`` if it contains a tokenizer, otherwise
    ``google-bert/bert-base-uncased``.
    """
    aspect: Aspect = "crop"
    """how non-square images are resized: ``"crop"`` scales the shorter side and keeps the centre, as in the authors'
    code, ``"pad"`` scales the longer side and adds black borders, ``"squash"`` scales both sides and so changes the
    aspect ratio.
    """
    micro_batch: int | None = Field(None, ge=1)
    """number of images per pass of the model; fewer need less memory. null: all images at once."""

    def check_files(self) -> list[ConfigProblem]:
        problems = [("checkpoint", checkpoint_problem(self.checkpoint, ["ImageReward.pt"], self.revision))]
        problems.append(("tokenizer", availability_problem(self.tokenizer) if self.tokenizer else ""))
        return [(key, problem) for key, problem in problems if problem]
