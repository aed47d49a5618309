"""Config of the reward `reweighted`. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.errors import ConfigProblem
from longalign.registry import Part
from longalign.rewards.config import RewardConfig


class ReweightedConfig(RewardConfig):
    """Reward whose text-irrelevant part is scaled by ``omega`` (LongAlign, paper section 4)."""

    target: ClassVar[str] = "longalign.rewards.reweighted.reward:ReweightedReward"

    name: Literal["reweighted"] = "reweighted"
    inner: Part("rewards")
    """the reward to decompose; its score must be a dot product of embeddings."""
    omega: float = Field(0.3, ge=0, allow_inf_nan=False)
    """weight of the text-irrelevant part; 1: the original score, 0: only the text-relevant part. The paper uses
    0.3.
    """
    direction: str = "batch"
    """source of the common direction V of text embeddings. ``"batch"`` uses the batch over all processes, as in the
    paper; ``"running"`` uses all training batches so far, including the current one. Otherwise a file written by
    ``longalign compute-direction``.
    """

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: RewardConfig) -> RewardConfig:
        if not inner.embeds:
            raise ValueError(
                f"'{inner.name}' is not a dot product of embeddings, so it has no text-irrelevant "
                "part; to reweight a sum, wrap each of its terms in `reweighted`"
            )
        return inner

    def check_files(self) -> list[ConfigProblem]:
        if self.direction in ("batch", "running") or Path(self.direction).is_file():
            return []
        message = f"no file {self.direction}; expected batch, running, or a file written by `compute-direction`"
        return [("direction", message)]

    def is_differentiable(self) -> bool:
        return self.inner.is_differentiable()
