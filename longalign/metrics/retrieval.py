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
    """R@1: whether a prompt retrieves its image among all images of the model, or vice versa (paper, table 1).

    The score of a pair is ``C_X . C_P``, or ``C_X . C_P_perp`` with the text embedding's component orthogonal to the
    common direction of the distinct prompts. Candidates are one image of each prompt. If prompts have several images,
    the first images of all prompts are compared, then the second ones, and so on. One value per image, 0 or 1.

    Args:
        label: name in the table.
        reward: the embedding reward. Its config decides how a prompt is encoded: ``text: whole`` in one pass, ``text:
            segments`` as the mean over its sentences.
        query: the query: ``"text"`` retrieves images, ``"image"`` retrieves texts.
        orthogonal: whether to use ``C_P_perp``. With a single prompt, the values are then NaN.
        num_sentences: number of sentences of a prompt that are used, from the first (paper, table 4); None for all.
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
