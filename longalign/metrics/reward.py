"""Scores of a reward and their decomposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longalign import registry
from longalign.functional.preference import decompose, strict_relevance
from longalign.metrics.base import Metric, Observations, Value
from longalign.metrics.config import RewardMetricConfig
from longalign.metrics.embedding import text_direction
from longalign.rewards.base import EmbeddingReward, Reward, as_reward, guarded
from longalign.runtime import Runtime


class RewardMetric(Metric):
    """The score of a reward and its components, one value per image.

    The score of an `EmbeddingReward` is decomposed along the common direction ``V``: the normalized mean text embedding
    of the different prompts that are evaluated (LongAlign, paper 4.1). The values are:

    - ``<label>``: the score.
    - ``<label>.text_irrelevant``: the dot product of the image embedding and the text embedding's component along
      ``V``. A rise can be over-optimization, so changes count neither as gains nor as losses.
    - ``<label>.text_relevant``: the rest of the score.
    - ``<label>-o``: the cosine of the image embedding with the text embedding's component orthogonal to ``V``. With
      Denscore, this is Denscore-O of the paper's tables.

    The last three are NaN if there is only one prompt. For other rewards, the values are ``<label>`` and
    ``<label>.<part>`` for each of `Scores.parts`.

    Args:
        label: name of the score in the table.
        reward: a `Reward`, or a function that maps images ``(b, 3, h, w)`` and b prompts to scores ``(b,)``.
        segments: whether to add the mean and the lowest score over the segments of each prompt, e.g. its sentences, as
            ``<label>.segment_mean`` and ``<label>.segment_min``.

    Raises:
        ValueError: if ``segments`` is set and the reward cannot score segments.
    """

    def __init__(self, label: str, reward: Reward | Callable[[Tensor, Sequence[str]], Any], *, segments: bool = False):
        super().__init__()
        self.label, self.reward, self.segments = label, as_reward(reward, label), segments
        self.values = {f"{label}.text_irrelevant": Value(direction=None)}
        if segments and not hasattr(self._inner(), "by_segment"):
            raise ValueError(
                f"'{label}' cannot score segments; use a reward with an image and a text encoder, such as clip, or set "
                "`segments: false`"
            )

    @classmethod
    def from_config(cls, config: RewardMetricConfig, runtime: Runtime) -> RewardMetric:
        reward = registry.rewards.construct(config.reward, runtime)
        metric = cls(config.prefix(), reward, segments=config.segments)
        metric.reward.eval()
        return metric

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        if isinstance(self.reward, EmbeddingReward):
            rows: dict[str, Any] = {
                "image": self.reward.image_features(images),
                "text": self.reward.text_features(prompts),
            }
        else:
            scores = guarded(self.reward, images, prompts)
            rows = {self.label: scores.total, **{f"{self.label}.{k}": v for k, v in scores.parts.items()}}
        if self.segments:
            by_prompt = [[s for _, s in row] for row in self.by_segment(images, prompts, rows.get("image"))]
            rows[f"{self.label}.segment_mean"] = [float(np.mean(scores)) for scores in by_prompt]
            rows[f"{self.label}.segment_min"] = [min(scores) for scores in by_prompt]
        return rows

    def finish(self, observations: Observations, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
        values = super().finish(observations, prompts, seeds)
        if not isinstance(self.reward, EmbeddingReward):
            return dict(values)
        image, text = (torch.from_numpy(observations[name]).double() for name in ("image", "text"))
        names = [self.label, f"{self.label}.text_relevant", f"{self.label}.text_irrelevant", f"{self.label}-o"]
        direction = text_direction(text, prompts)
        parts = decompose(image, text, direction)
        strict = strict_relevance(image, text, direction)
        decomposed = [parts.relevant + parts.irrelevant, parts.relevant, parts.irrelevant, strict]
        if len(set(prompts)) < 2:
            decomposed[1:] = [torch.full_like(strict, torch.nan)] * 3
        return {**dict(zip(names, (rows.numpy() for rows in decomposed), strict=True)), **values}

    def by_segment(
        self, images: Tensor, prompts: Sequence[str], features: Tensor | None = None
    ) -> list[list[tuple[str, float]]]:
        """Returns text and score of each segment of each prompt, like `longalign.rewards.TowerReward.by_segment`.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            prompts: one for each image.
            features: ``(b, d)`` embeddings of the images, if already computed; None computes them.
        """
        inner = self._inner()
        if features is not None and hasattr(inner, "score_segments"):
            return inner.score_segments(features, prompts)
        return inner.by_segment(images, prompts)

    def cosines(
        self, images: Tensor, texts: Sequence[Sequence[str]], features: Tensor | None = None
    ) -> list[list[float]]:
        """Returns the dot products of each image's embedding with the embeddings of its texts.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            texts: for each image, any number of texts.
            features: ``(b, d)`` embeddings of the images, if already computed; None computes them.

        Returns:
            For each image, one number per text. It is the cosine if the text is encoded in one pass. It can be smaller
            in absolute value if the reward splits the text into segments, whose mean embedding has a norm below 1.
        """
        inner = self._inner()
        known: Tensor = inner.image_features(images) if features is None else features
        text_features = [inner.text_features(row) for row in texts]
        return [(t @ f.to(t.device)).tolist() for t, f in zip(text_features, known, strict=True)]

    def _inner(self) -> Any:
        return getattr(self.reward, "inner", self.reward)
