"""Facts as class labels, and heads that predict them from embeddings and token states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longalign.mini.captions import Caption
from longalign.mini.scenes import ATTRIBUTES, PLACES, VALUES, Scene

IGNORED = -100
NONE = len(VALUES["shape"])
"""Label of an empty place in its shape slot."""
SIZES = [len(VALUES["ground"])] + [len(VALUES[a]) + (a == "shape") for _ in PLACES for a in ATTRIBUTES]
"""Number of classes of each slot: the ground, then shape, colour, size and fill of each place."""


def labels_of_scene(scene: Scene) -> list[int]:
    """One label per slot; attributes of empty places are `IGNORED`."""
    labels = [VALUES["ground"].index(scene.ground)] + [NONE, IGNORED, IGNORED, IGNORED] * len(PLACES)
    for thing in scene.things:
        start = 1 + 4 * PLACES.index(thing.place)
        labels[start : start + 4] = [VALUES[a].index(getattr(thing, a)) for a in ATTRIBUTES]
    return labels


def labels_of_caption(caption: Caption) -> list[int]:
    """Like `labels_of_scene`, for the facts of a caption; all other slots are `IGNORED`."""
    labels = [IGNORED] * len(SIZES)
    for fact in caption.facts:
        if fact.kind == "ground":
            labels[0] = VALUES["ground"].index(fact.value)
        elif fact.kind == "empty":
            labels[1 + 4 * PLACES.index(fact.place)] = NONE
        else:
            slot = 1 + 4 * PLACES.index(fact.place) + ATTRIBUTES.index(fact.kind)
            labels[slot] = VALUES[fact.kind].index(fact.value)
    return labels


def all_true(text_labels: Tensor, image_labels: Tensor) -> Tensor:
    """``(texts, images)`` bool: whether all facts of a text hold in an image."""
    return ((text_labels[:, None] == image_labels[None]) | (text_labels[:, None] == IGNORED)).all(-1)


def contrast(scores: Tensor, match: Tensor) -> Tensor:
    """Symmetric contrastive loss of ``scores`` (texts, images); a text may ``match`` several images."""
    by_text = F.cross_entropy(scores, match / match.sum(1, keepdim=True))
    return by_text / 2 + F.cross_entropy(scores.T, match.T / match.T.sum(1, keepdim=True)) / 2


class FactHead(nn.Module):
    """Linear classifiers of all slots on an embedding ``(b, d)``."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, sum(SIZES))

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cross-entropy and accuracy, from embeddings ``(b, d)`` and labels ``(b, slots)``."""
        return fact_loss(self.linear(features).split(SIZES, -1), labels)


def fact_loss(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cross-entropy and accuracy over the slots that are not `IGNORED`.

    Args:
        logits: ``(b, classes)`` for each slot.
        labels: ``(b, slots)``, see `label_tensor`.
    """
    pairs = list(zip(logits, labels.T, strict=True))
    losses = [F.cross_entropy(g, y, reduction="sum", ignore_index=IGNORED) for g, y in pairs]
    correct = [((g.argmax(-1) == y) & (y != IGNORED)).sum() for g, y in pairs]
    count = (labels != IGNORED).sum().clamp(min=1)
    return torch.stack(losses).sum() / count, torch.stack(correct).sum() / count


class TokenHead(nn.Module):
    """Predicts the facts of each place from the token states by attention, like a denoiser's cross-attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(10, dim) / dim**0.5)
        self.keys, self.values = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ground, self.place = nn.Linear(dim, SIZES[0]), nn.Linear(dim, sum(SIZES[1:5]))

    def forward(self, states: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cross-entropy and accuracy over the labelled slots.

        Args:
            states: ``(b, n, d)`` token states.
            mask: ``(b, n)``, 0 for padding.
            labels: ``(b, slots)``, see `label_tensor`.
        """
        scores = torch.einsum("qd,bnd->bqn", self.queries, self.keys(states))
        weights = scores.masked_fill(mask[:, None] == 0, -1e4).softmax(-1)
        pooled = weights @ self.values(states)
        logits = [self.ground(pooled[:, 0])]
        for place in range(9):
            logits += self.place(pooled[:, place + 1]).split(SIZES[1:5], -1)
        return fact_loss(logits, labels)


def label_tensor(rows: Sequence[list[int]]) -> Tensor:
    """Labels as one int64 tensor ``(b, slots)``."""
    return torch.from_numpy(np.array(rows, np.int64))
