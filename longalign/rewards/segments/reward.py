"""Scores of each segment of a prompt, e.g. each sentence, combined by mean or minimum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longalign import registry
from longalign.rewards.base import Reward, Scores, as_reward, check_pairs
from longalign.rewards.segments.config import SegmentsConfig
from longalign.runtime import Runtime
from longalign.segmenters import Segmenter, split


class SegmentsReward(Reward):
    """Mean or minimum of an inner reward over the segments of each prompt: ``reduce_j inner(image, segment_j)``.

    `Scores.parts` contain mean and minimum as ``mean`` and ``min``.

    Args:
        inner: reward that scores each segment against the image of its prompt, by `Reward.score_texts`.
        segmenter: splits prompts into segments, e.g. sentences. Segments of more than ``inner.window`` tokens are split
            further.
        reduce: ``"mean"`` or ``"min"``.
    """

    def __init__(self, inner: Reward, segmenter: Segmenter, *, reduce: str):
        super().__init__()
        self.inner, self.segmenter, self.reduce = inner, segmenter, reduce

    @classmethod
    def from_config(cls, config: SegmentsConfig, runtime: Runtime) -> SegmentsReward:
        """Builds the inner reward, which may be a function registered as a reward, and the segmenter."""
        inner = as_reward(registry.rewards.build(config.inner, runtime), config.inner.name)
        segmenter = registry.segmenters.build(config.segmenter, runtime)
        return cls(inner, segmenter, reduce=config.reduce).to(runtime.device)

    def segments(self, prompt: str) -> list[str]:
        """Returns the segments of one prompt that are scored, in order; one empty text for an empty prompt."""
        segments = [s.strip() for s in split(self.segmenter, prompt, self.inner.count_tokens, self.inner.window)]
        return [s for s in segments if s] or [""]

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        segments = [self.segments(prompt) for prompt in prompts]
        texts = [text for row in segments for text in row]
        image_index = [i for i, row in enumerate(segments) for _ in row]
        scores = self.inner.score_texts(images, texts, image_index)
        by_prompt = scores.split([len(row) for row in segments])
        parts = {
            "mean": torch.stack([row.mean() for row in by_prompt]),
            "min": torch.stack([row.min() for row in by_prompt]),
        }
        total = parts[self.reduce]
        return Scores(total, {name: part.detach() for name, part in parts.items()}).checked(images, prompts)
