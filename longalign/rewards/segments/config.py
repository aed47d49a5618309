"""Config of the reward `segments`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from longalign.registry import Part, PartConfig
from longalign.rewards.config import RewardConfig, TowerRewardConfig


class SegmentsConfig(RewardConfig):
    """Scores each segment of a prompt, e.g. each sentence, with an inner reward, and takes the mean or the minimum.

    Use this reward if the inner reward reads short texts only, such as ``imagereward``, or to optimize the segment with
    the lowest score (``reduce: min``). For the mean over segments of a reward with an image and a text encoder, such as
    ``clip``, set ``text: segments`` of that reward instead.
    """

    target: ClassVar[str] = "longalign.rewards.segments.reward:SegmentsReward"

    name: Literal["segments"] = "segments"
    inner: Part("rewards")
    """the reward that scores each segment."""
    segmenter: Part("segmenters") = "sentence"  # type: ignore[assignment]
    """how prompts are split. A segment of more tokens than the inner reward reads at a time is split further."""
    reduce: Literal["mean", "min"] = "mean"
    """how the scores of a prompt's segments are combined. With ``"min"``, only the segment of the lowest score
    contributes to the gradient.
    """

    @model_validator(mode="after")
    def _check_inner(self) -> SegmentsConfig:
        inner: PartConfig = self.inner
        if isinstance(inner, TowerRewardConfig) and self.reduce == "mean":
            raise ValueError(
                f"'{inner.name}' computes the mean over segments itself, with one text embedding per prompt; set "
                "`text: segments` (and `segmenter`) of that reward, or `reduce: min` here"
            )
        return self

    def is_differentiable(self) -> bool:
        return self.inner.is_differentiable()
