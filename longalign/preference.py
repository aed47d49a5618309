"""Decomposition of preference scores into a text-relevant and a text-irrelevant part (LongAlign, paper 3.2 and 4).

A CLIP-style score is ``s = C_X(x) . C_P(p)``. Text embeddings share a common direction ``V``, so that
``C_P = C_P_perp + eta V`` with ``eta = C_P . V``; ``C_X . C_P_perp`` answers to the text, ``C_X . eta V`` to what the
model likes whatever the text (aesthetics and the like). Products are element-wise sums rather than matrix products,
so that autocast leaves them in the precision of their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Decomposition:
    """A score taken apart: ``relevant + irrelevant`` is the plain score.

    Attributes:
        relevant: ``(b,)`` ``C_X . C_P_perp``.
        irrelevant: ``(b,)`` ``C_X . eta V``.
        eta: ``(b,)`` ``C_P . V``.
    """

    relevant: Tensor
    irrelevant: Tensor
    eta: Tensor


def normalise(mean: Tensor) -> Tensor:
    """A mean text embedding ``(d,)`` as the unit direction ``V (d,)``. Raises ValueError if it has no direction."""
    norm = mean.norm()
    if not norm > 0:
        raise ValueError(f"the mean text embedding has norm {norm.item()}, so there is no common direction")
    return mean / norm


def common_direction(text: Tensor) -> Tensor:
    """``V``: the normalised mean of text embeddings ``(n, d)``, a unit vector ``(d,)`` (paper 3.2).

    For Denscore a row is a prompt's mean over its segments' unit embeddings.
    """
    if text.ndim != 2 or not len(text):
        raise ValueError(f"expected text embeddings (n, d) with n > 0, got shape {tuple(text.shape)}")
    return normalise(text.mean(0))


def eta(text: Tensor, direction: Tensor) -> Tensor:
    """``eta = C_P . V``, the length of embeddings ``(b, d)`` along the unit direction ``(d,)``: ``(b,)``."""
    return (text * direction).sum(-1)


def perpendicular(text: Tensor, direction: Tensor) -> Tensor:
    """``C_P_perp = C_P - eta V``, the part ``(b, d)`` of the embeddings that is orthogonal to the direction."""
    return reweight(text, direction, 0.0)


def reweight(text: Tensor, direction: Tensor, omega: float) -> Tensor:
    """``C_P_perp + omega eta V = C_P - (1 - omega) eta V``, ``(b, d)`` (paper section 4).

    Args:
        text: embeddings ``C_P``, ``(b, d)``.
        direction: unit vector ``V``, ``(d,)``.
        omega: 1 gives back ``text`` exactly, 0 its text-relevant part alone.
    """
    return text - (1 - omega) * eta(text, direction)[:, None] * direction


def decompose(image: Tensor, text: Tensor, direction: Tensor) -> Decomposition:
    """Both parts of the scores of unit image embeddings ``(b, d)`` with text embeddings ``(b, d)``."""
    length = eta(text, direction)
    irrelevant = (image * direction).sum(-1) * length
    return Decomposition((image * perpendicular(text, direction)).sum(-1), irrelevant, length)


def strict_relevance(image: Tensor, text: Tensor, direction: Tensor) -> Tensor:
    """``C_X . C_P_perp / |C_P_perp|``, ``(b,)``: with Denscore's embeddings the paper's metric Denscore-O.

    A text that lies on the direction has no relevant part and scores 0.
    """
    return (image * F.normalize(perpendicular(text, direction), dim=-1)).sum(-1)


def running_mean(mean: Tensor, count: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over all rows seen so far, each with the same weight.

    Args:
        mean: ``(d,)`` mean of the rows before; ignored where ``count`` is 0.
        count: ``()`` integer number of those rows.
        batch: ``(n, d)`` new rows.

    Returns:
        The new mean ``(d,)`` and the new count ``()``.
    """
    total = count + len(batch)
    return mean + (batch - mean).sum(0) / total, total
