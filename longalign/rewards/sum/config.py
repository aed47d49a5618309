"""Config of the reward `sum`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.registry import Part, Section
from longalign.rewards.config import RewardConfig


class TermConfig(Section):
    """One term of a sum: a reward with its weight and its name in the logs."""

    reward: Part("rewards")
    """the reward that scores the images."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """factor of the reward's scores, any finite number; with a negative factor the reward is a penalty."""
    label: str | None = Field(None, min_length=1)
    """name of the term's logged curves, unique in the sum; null: the reward's name, with a number if that name is
    already used.
    """


class SumConfig(RewardConfig):
    """Weighted sum of rewards, ``sum_i weight_i * reward_i``."""

    target: ClassVar[str] = "longalign.rewards.sum.reward:SumReward"

    name: Literal["sum"] = "sum"
    terms: tuple[TermConfig, ...]
    """the rewards and their weights, at least one."""
    normalize: Literal["none", "running"] = "none"
    """scale of the terms before they are weighted. ``"none"`` keeps the scale of each reward. ``"running"`` replaces
    the scores of each term by z-scores, with the mean and standard deviation of all scores of the term so far in
    training mode, so that terms of different scale count equally. Scores of the sum then depend on the run so far.
    """

    def is_differentiable(self) -> bool:
        return all(term.reward.is_differentiable() for term in self.terms)

    @field_validator("terms")
    @classmethod
    def _check_terms(cls, terms: tuple[TermConfig, ...]) -> tuple[TermConfig, ...]:
        if not terms:
            raise ValueError("a sum needs at least one term, such as {reward: clip, weight: 1.0}")
        labels = [t.label for t in terms if t.label is not None]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(
                f"labels must be unique, got {', '.join(map(repr, repeated))} more than once; rename a label"
            )
        return terms
