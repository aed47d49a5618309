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
"""Side in pixels to which images are reduced before they are compared by pixels."""


class Diversity(Metric):
    """Mean pairwise distance of the images of one prompt from different seeds.

    The value of an image is its mean distance to the other images of its prompt, so the mean over a prompt is the mean
    over its pairs. NaN for prompts with a single image.

    Args:
        label: name in the table.
        reward: the distance is one minus the cosine of this reward's image embeddings. If None, it is the root mean
            square difference of the pixels, of images averaged to 32 by 32.
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
        """Pairwise distances ``(m, m)``, with an exact zero of an image to itself."""
        if self.reward is None:
            return (
                torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[1] ** 0.5
            )
        return (1 - features @ features.T).fill_diagonal_(0)
