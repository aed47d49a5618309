"""Config of the reward `reweighted`; importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.errors import ConfigProblem
from longalign.registry import Part
from longalign.rewards.config import RewardConfig


class ReweightedConfig(RewardConfig):
    """An embedding reward with its text-irrelevant part scaled (LongAlign, paper section 4)."""

    target: ClassVar[str] = "longalign.rewards.reweighted.reward:ReweightedReward"

    name: Literal["reweighted"] = "reweighted"
    inner: Part("rewards")
    """the reward to decompose; its score must be a dot product of embeddings."""
    omega: float = Field(0.3, ge=0, allow_inf_nan=False)
    """weight of the text-irrelevant part: 1 is the plain score, 0 alignment only, 0.3 the paper's choice."""
    direction: str = "batch"
    """source of the common direction V of text embeddings: ``"batch"`` (this batch over all processes, as in the
    paper), ``"running"`` (all training batches so far, including this one), or a file written by ``longalign
    compute-direction``.
    """

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: RewardConfig) -> RewardConfig:
        if not inner.embeds:
            raise ValueError(
                f"'{inner.name}' is not a product of embeddings, so it has no text-irrelevant part; "
                "to reweight a sum, wrap each of its terms in `reweighted`"
            )
        return inner

    def check_files(self) -> list[ConfigProblem]:
        if self.direction in ("batch", "running") or Path(self.direction).is_file():
            return []
        message = f"no file {self.direction}; expected batch, running, or a file written by `compute-direction`"
        return [("direction", message)]

    def is_differentiable(self) -> bool:
        return self.inner.is_differentiable()
