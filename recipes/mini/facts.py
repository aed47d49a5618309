"""Facts as class labels, and a linear head that reads them from an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longalign.mini.captions import Caption
from longalign.mini.scenes import ATTRIBUTES, PLACES, VALUES, Scene

UNTOLD = -100
NONE = len(VALUES["shape"])
"""Label of an empty place in its shape slot."""
SIZES = [len(VALUES["ground"])] + [len(VALUES[a]) + (a == "shape") for _ in PLACES for a in ATTRIBUTES]
"""Number of classes of each slot: the ground, then shape, colour, size and fill of each place."""


def labels_of_scene(scene: Scene) -> list[int]:
    """One label a slot; attributes of empty places are `UNTOLD`."""
    labels = [VALUES["ground"].index(scene.ground)] + [NONE, UNTOLD, UNTOLD, UNTOLD] * len(PLACES)
    for thing in scene.things:
        start = 1 + 4 * PLACES.index(thing.place)
        labels[start : start + 4] = [VALUES[a].index(getattr(thing, a)) for a in ATTRIBUTES]
    return labels


def labels_of_caption(caption: Caption) -> list[int]:
    """As `labels_of_scene`, for what a caption tells; the rest is `UNTOLD`."""
    labels = [UNTOLD] * len(SIZES)
    for fact in caption.facts:
        if fact.kind == "ground":
            labels[0] = VALUES["ground"].index(fact.value)
        elif fact.kind == "empty":
            labels[1 + 4 * PLACES.index(fact.place)] = NONE
        else:
            slot = 1 + 4 * PLACES.index(fact.place) + ATTRIBUTES.index(fact.kind)
            labels[slot] = VALUES[fact.kind].index(fact.value)
    return labels


def all_true(told: Tensor, shown: Tensor) -> Tensor:
    """``(texts, images)`` bool: whether every fact told in a text is true of an image."""
    return ((told[:, None] == shown[None]) | (told[:, None] == UNTOLD)).all(-1)


def contrast(scores: Tensor, match: Tensor) -> Tensor:
    """The contrastive loss both ways over ``scores`` (texts, images); ``match`` may name several images a text."""
    by_text = F.cross_entropy(scores, match / match.sum(1, keepdim=True))
    return by_text / 2 + F.cross_entropy(scores.T, match.T / match.T.sum(1, keepdim=True)) / 2


class FactHead(nn.Module):
    """Linear classifiers of all slots on one embedding ``(b, d)``."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, sum(SIZES))

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the told facts, and the share of them that is read rightly."""
        return fact_loss(self.linear(features).split(SIZES, -1), labels)


def fact_loss(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the told facts of all slots, and the share of them that is read rightly."""
    pairs = list(zip(logits, labels.T, strict=True))
    losses = [F.cross_entropy(g, y, reduction="sum", ignore_index=UNTOLD) for g, y in pairs]
    hits = [((g.argmax(-1) == y) & (y != UNTOLD)).sum() for g, y in pairs]
    told = (labels != UNTOLD).sum().clamp(min=1)
    return torch.stack(losses).sum() / told, torch.stack(hits).sum() / told


class TokenHead(nn.Module):
    """Reads each place's facts from the token states by attention, as a denoiser's cross-attention would."""

    def __init__(self, dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(10, dim) / dim**0.5)
        self.keys, self.values = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ground, self.place = nn.Linear(dim, SIZES[0]), nn.Linear(dim, sum(SIZES[1:5]))

    def forward(self, states: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the told facts and the share read rightly, from states ``(b, n, d)``."""
        scores = torch.einsum("qd,bnd->bqn", self.queries, self.keys(states))
        weights = scores.masked_fill(mask[:, None] == 0, -1e4).softmax(-1)
        read = weights @ self.values(states)
        logits = [self.ground(read[:, 0])]
        for place in range(9):
            logits += self.place(read[:, place + 1]).split(SIZES[1:5], -1)
        return fact_loss(logits, labels)


def tensor(rows: Sequence[list[int]]) -> Tensor:
    """Labels as one int64 tensor ``(b, slots)``."""
    return torch.from_numpy(np.array(rows, np.int64))
