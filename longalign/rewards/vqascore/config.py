"""Config of the reward `vqascore`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.errors import ConfigProblem
from longalign.hub import checkpoint_problem
from longalign.rewards.config import RewardConfig
from longalign.vlm.config import check_template


class VqaScoreConfig(RewardConfig):
    """VQAScore (Lin et al. 2024, arXiv 2404.01291): the probability that a vision-language model answers "Yes".

    The model is asked whether the image shows what the prompt describes. The default, LLaVA-1.5, is one of the models
    of the paper; the paper's main model, CLIP-FlanT5, is not part of transformers.
    """

    target: ClassVar[str] = "longalign.rewards.vqascore.reward:VqaScoreReward"

    name: Literal["vqascore"] = "vqascore"
    checkpoint: str = "llava-hf/llava-1.5-7b-hf"
    """Hub id, or local folder, with a decoder-only model of transformers, its processor and its chat template."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository; null: its main branch."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the weights; null: that of ``loop.precision`` in a run, float32 in other commands."""
    question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
    """the question to the model. ``{prompt}`` is replaced by the prompt of the image."""
    answer: str = Field("Yes", min_length=1)
    """the answer whose probability is the score; it must be one token of the model's vocabulary."""
    micro_batch: int | None = Field(None, ge=1)
    """number of images per pass of the model; fewer need less memory. null: all images at once."""

    @field_validator("question")
    @classmethod
    def _check_question(cls, question: str) -> str:
        return check_template(question, "{prompt}")

    def check_files(self) -> list[ConfigProblem]:
        problem = checkpoint_problem(self.checkpoint, ["config.json"], self.revision)
        return [("checkpoint", problem)] if problem else []
