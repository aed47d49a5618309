"""Retrieval accuracy (R@1) between prompts and images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longalign.functional.preference import perpendicular
from longalign.metrics.base import Metric, Observations, Value
from longalign.metrics.config import RetrievalConfig
from longalign.metrics.embedding import build_embedding_reward, text_direction
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import Runtime
from longalign.segmenters import sentences


class Retrieval(Metric):
    """R@1: whether the image most similar to a prompt is its own, or the reverse, see ``query`` (LongAlign, table 1).

    The similarity of an image and a prompt is ``C_X . C_P``, the dot product of image and text embedding. With
    ``orthogonal`` it is ``C_X . C_P_perp``, where ``C_P_perp`` is the component of ``C_P`` orthogonal to the mean text
    embedding of the different prompts. Candidates are one image of each prompt: if prompts have several images, the
    first images of all prompts are compared, then the second ones, and so on. The value of an image is 0 or 1.

    Args:
        label: name of the values in the table.
        reward: computes the embeddings. The config of the reward decides how a prompt is encoded: with ``text: whole``
            in one pass, with ``text: segments`` as the mean over its segments.
        query: ``"text"``: each prompt retrieves an image. ``"image"``: each image retrieves a prompt.
        orthogonal: whether to use ``C_P_perp``. With a single prompt, the values are then NaN.
        num_sentences: number of sentences of each prompt that are encoded, from the first (paper, table 4); None for
            all.
    """

    def __init__(
        self,
        label: str,
        reward: EmbeddingReward,
        *,
        query: Literal["text", "image"],
        orthogonal: bool,
        num_sentences: int | None,
    ):
        super().__init__()
        self.label, self.reward = label, reward
        self.query, self.orthogonal, self.num_sentences = query, orthogonal, num_sentences
        self.values = {label: Value("%")}

    @classmethod
    def from_config(cls, config: RetrievalConfig, runtime: Runtime) -> Retrieval:
        return cls(
            config.prefix(),
            build_embedding_reward(config.reward, runtime),
            query=config.query,
            orthogonal=config.component == "orthogonal",
            num_sentences=config.sentences,
        )

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        if self.num_sentences is not None:
            prompts = [" ".join(sentences(prompt)[: self.num_sentences]) for prompt in prompts]
        return {"image": self.reward.image_features(images), "text": self.reward.text_features(prompts)}

    def finish(self, observations: Observations, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
        image, text = (torch.from_numpy(observations[name]).double() for name in ("image", "text"))
        found = np.full(len(prompts), np.nan)
        if self.orthogonal:
            if len(set(prompts)) < 2:
                return {self.label: found}
            text = perpendicular(text, text_direction(text, prompts))
        occurrences: dict[str, int] = defaultdict(int)
        pools: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            pools[occurrences[prompt]].append(i)
            occurrences[prompt] += 1
        for pool in pools.values():
            scores = text[pool] @ image[pool].T
            best = scores.argmax(1 if self.query == "text" else 0)
            found[pool] = (best == torch.arange(len(pool))).double().numpy()
        return {self.label: found}
