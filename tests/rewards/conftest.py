"""Tiny checkpoints, built once per session, and a reward with known embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longalign.rewards.base import EmbeddingReward
from longalign.testing import tiny


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return str(tiny.tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="session")
def hpsv2_folder(tmp_path_factory):
    return str(tiny.tiny_hpsv2(tmp_path_factory.mktemp("hpsv2")))


class TableReward(EmbeddingReward):
    """Text embeddings from a table, or letter counts for other texts; image embeddings are normalized mean colours."""

    dim = 3

    def __init__(self, table: dict[str, list[float]]):
        super().__init__()
        self.table = table

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        letters = [[float(p.count(c)) + 0.1 for c in "aeo"] for p in prompts]
        rows = [self.table.get(p, row) for p, row in zip(prompts, letters, strict=True)]
        return torch.tensor(rows)


@pytest.fixture
def known():
    return TableReward(
        {"up": [0.6, 0.8, 0.0], "down": [0.6, -0.8, 0.0], "along": [1.0, 0.0, 0.0], "in": [0.0, 0.6, 0.8]}
    )
