"""Decomposition of preference scores into a text-relevant and a text-irrelevant part (LongAlign, paper 3.2 and 4).

A CLIP-style score is ``s = C_X(x) . C_P(p)``. Text embeddings share a common direction ``V``, so that
``C_P = C_P_perp + eta V`` with ``eta = C_P . V``. ``C_X . C_P_perp`` depends on the text; ``C_X . eta V`` captures
prompt-independent preference, e.g. aesthetics. Products are written as element-wise sums rather than matrix products,
so that autocast keeps the precision of their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Decomposition:
    """A decomposed score: ``relevant + irrelevant`` is the plain score.

    Attributes:
        relevant: ``(b,)`` ``C_X . C_P_perp``.
        irrelevant: ``(b,)`` ``C_X . eta V``.
        eta: ``(b,)`` ``C_P . V``.
    """

    relevant: Tensor
    irrelevant: Tensor
    eta: Tensor


def normalise(mean: Tensor) -> Tensor:
    """Normalises a mean text embedding ``(d,)`` to the direction ``V (d,)``; ValueError if its norm is 0 or NaN."""
    norm = mean.norm()
    if not norm > 0:
        raise ValueError(f"the mean text embedding has norm {norm.item()}, so it gives no common direction")
    return mean / norm


def common_direction(text: Tensor) -> Tensor:
    """``V``: the normalised mean of text embeddings ``(n, d)``, a unit vector ``(d,)`` (paper 3.2).

    For Denscore, a row is the mean of a prompt's unit segment embeddings.
    """
    if text.ndim != 2 or not len(text):
        raise ValueError(f"expected text embeddings (n, d) with n > 0, got shape {tuple(text.shape)}")
    return normalise(text.mean(0))


def eta(text: Tensor, direction: Tensor) -> Tensor:
    """``eta = C_P . V``, ``(b,)``: the component of embeddings ``(b, d)`` along the unit direction ``(d,)``."""
    return (text * direction).sum(-1)


def perpendicular(text: Tensor, direction: Tensor) -> Tensor:
    """``C_P_perp = C_P - eta V``, the part ``(b, d)`` of the embeddings that is orthogonal to the direction."""
    return reweight(text, direction, 0.0)


def reweight(text: Tensor, direction: Tensor, omega: float) -> Tensor:
    """``C_P_perp + omega eta V = C_P - (1 - omega) eta V``, ``(b, d)`` (paper section 4).

    Args:
        text: embeddings ``C_P``, ``(b, d)``.
        direction: unit vector ``V``, ``(d,)``.
        omega: 1 returns ``text`` exactly, 0 only its text-relevant part.
    """
    return text - (1 - omega) * eta(text, direction)[:, None] * direction


def decompose(image: Tensor, text: Tensor, direction: Tensor) -> Decomposition:
    """Decomposes the scores of unit image embeddings ``(b, d)`` with text embeddings ``(b, d)``."""
    component = eta(text, direction)
    irrelevant = (image * direction).sum(-1) * component
    return Decomposition((image * perpendicular(text, direction)).sum(-1), irrelevant, component)


def strict_relevance(image: Tensor, text: Tensor, direction: Tensor) -> Tensor:
    """``C_X . C_P_perp / |C_P_perp|``, ``(b,)``: with Denscore's embeddings the paper's metric Denscore-O.

    A text embedding parallel to the direction has no relevant part and scores 0.
    """
    return (image * F.normalize(perpendicular(text, direction), dim=-1)).sum(-1)


def running_mean(mean: Tensor, count: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Updates a mean with new rows; all rows have equal weight.

    Args:
        mean: ``(d,)`` mean of the previous rows; ignored if ``count`` is 0.
        count: ``()`` integer number of previous rows.
        batch: ``(n, d)`` new rows.

    Returns:
        The new mean ``(d,)`` and the new count ``()``.
    """
    total = count + len(batch)
    return mean + (batch - mean).sum(0) / total, total
