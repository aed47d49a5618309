"""Diversity of the images of one prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longalign.metrics.base import Metric, Observations
from longalign.metrics.config import DiversityConfig
from longalign.metrics.embedding import build_embedding_reward
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import Runtime

SIDE = 32
"""Side in pixels to which images are averaged before their pixels are compared."""


class Diversity(Metric):
    """Mean distance between images of the same prompt from different seeds.

    The value of an image is its mean distance to the other images of its prompt, so the mean over the images of a
    prompt is the mean over their pairs. The value is NaN if a prompt has a single image.

    Args:
        label: name of the values in the table.
        reward: a reward with image embeddings; the distance of two images is one minus the cosine of their embeddings.
            If None, the distance is the root mean square difference of their pixels in [0, 1], after averaging each
            image to 32 by 32 pixels.
    """

    def __init__(self, label: str, reward: EmbeddingReward | None):
        super().__init__()
        self.label, self.reward = label, reward

    @classmethod
    def from_config(cls, config: DiversityConfig, runtime: Runtime) -> Diversity:
        reward = None if config.reward is None else build_embedding_reward(config.reward, runtime)
        return cls(config.prefix(), reward)

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        if self.reward is not None:
            return {"features": self.reward.image_features(images)}
        return {"features": F.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)}

    def finish(self, observations: Observations, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
        features = torch.from_numpy(observations["features"]).double()
        groups: dict[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            groups[prompt].append(i)
        values = np.full(len(prompts), np.nan)
        for rows in groups.values():
            if len(rows) > 1:
                values[rows] = self._distances(features[rows]).sum(1).numpy() / (len(rows) - 1)
        return {self.label: values}

    def _distances(self, features: Tensor) -> Tensor:
        """Returns pairwise distances ``(m, m)`` of features ``(m, d)``; the diagonal is exactly zero."""
        if self.reward is None:
            return (
                torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[1] ** 0.5
            )
        return (1 - features @ features.T).fill_diagonal_(0)
