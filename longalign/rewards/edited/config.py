"""Configs of the rewards `edited` and `reweighted`. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.edits.config import DirectionConfig
from longalign.errors import ConfigProblem
from longalign.registry import Part
from longalign.rewards.config import RewardConfig


class InnerRewardConfig(RewardConfig):
    """Base class of the configs of rewards that decompose an inner reward along a common direction."""

    target: ClassVar[str] = "longalign.rewards.edited.reward:EditedReward"

    inner: Part("rewards")
    """the reward to decompose; its score must be a dot product of embeddings."""
    direction: str = "batch"
    """source of the common direction V of text embeddings, along which the score is decomposed. ``"batch"`` uses the
    batch over all processes, as in the paper; ``"running"`` uses all training batches so far, including the current
    one. Otherwise a file written by ``longalign compute-direction``.
    """

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: RewardConfig) -> RewardConfig:
        if not inner.embeds:
            raise ValueError(
                f"'{inner.name}' is not a dot product of embeddings, so it has no text embedding to edit and no "
                "text-irrelevant part; to edit a sum, wrap each of its terms"
            )
        return inner

    def check_files(self) -> list[ConfigProblem]:
        if self.direction in ("batch", "running") or Path(self.direction).is_file():
            return []
        message = f"no file {self.direction}; expected batch, running, or a file written by `compute-direction`"
        return [("direction", message)]

    def is_differentiable(self) -> bool:
        return self.inner.is_differentiable()


class EditedConfig(InnerRewardConfig):
    """Reward with an edited text embedding, and its decomposition along a common direction."""

    name: Literal["edited"] = "edited"
    edit: Part("edits")
    """how the text embedding is edited."""


class ReweightedConfig(InnerRewardConfig):
    """Reward whose text-irrelevant part is scaled by ``omega`` (LongAlign, paper section 4).

    It is short for the reward ``edited`` with the edit ``direction``.
    """

    name: Literal["reweighted"] = "reweighted"
    omega: float = Field(0.3, ge=0, allow_inf_nan=False)
    """weight of the text-irrelevant part; 1: the original score, 0: only the text-relevant part. The paper uses
    0.3.
    """

    @property
    def edit(self) -> DirectionConfig:
        """The edit that the config is short for."""
        return DirectionConfig(omega=self.omega)
