"""The interface of rewards: images and prompts in, one differentiable score per image out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    """Scores of a batch and what they are made of.

    Attributes:
        total: ``(b,)`` what is maximised; differentiable in the images.
        parts: named ``(b,)`` tensors logged as curves of their own, e.g. ``text_relevant`` and ``text_irrelevant``.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Reward(nn.Module):
    """Base of rewards. Modules are frozen; gradient flows into the images only."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images ``(b, 3, h, w)`` in [0, 1] against one prompt each; returns ``(b,)``, higher is better."""
        return self.scores(images, prompts).total

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """As `score`, with the parts of the score beside the total."""
        raise NotImplementedError


class EmbeddingReward(Reward):
    """A reward that is a product of unit embeddings, ``s = C_X(x) . C_P(p)`` (LongAlign, paper section 3.2).

    Concrete rewards give the two features; the score, its decomposition and its reweighting follow from them.
    """

    def image_features(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] of any resolution to unit embeddings ``(b, d)``, with gradient."""
        raise NotImplementedError

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings ``(b, d)`` without gradient: unit embeddings of the whole text in one pass, or the
        mean over segments of the segments' unit embeddings, which is not normalised again (Denscore, paper 3.2)."""
        raise NotImplementedError

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        return Scores((self.image_features(images) * self.text_features(prompts)).sum(-1))
