"""Decomposition of preference scores into a text-relevant and a text-irrelevant part.

The source is LongAlign (arXiv 2410.11817, sections 3.2 and 4). A CLIP-style score of image ``x`` and prompt ``p`` is
``s = C_X(x) . C_P(p)``, with unit image embedding ``C_X`` and text embedding ``C_P``. Text embeddings share a common
direction, the unit vector ``V``, so that ``C_P = C_P_perp + eta V`` with ``eta = C_P . V`` and ``C_P_perp``
orthogonal to ``V``. The text-relevant part ``C_X . C_P_perp`` depends on the text. The text-irrelevant part
``C_X . eta V`` measures prompt-independent preference, e.g. aesthetics. Dot products are computed as element-wise sums
rather than matrix products, which autocast would compute in lower precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Decomposition:
    """Scores of b pairs of image and prompt, decomposed into two parts whose sum is the original score.

    ``C_X`` is the image embedding, ``C_P`` the text embedding, ``V`` the common direction of text embeddings, and
    ``C_P_perp`` the part of ``C_P`` orthogonal to ``V``.

    Attributes:
        relevant: ``(b,)`` text-relevant part ``C_X . C_P_perp``.
        irrelevant: ``(b,)`` text-irrelevant part ``C_X . eta V``.
        eta: ``(b,)`` component ``C_P . V`` of the text embedding along ``V``.
    """

    relevant: Tensor
    irrelevant: Tensor
    eta: Tensor


def normalize(mean: Tensor) -> Tensor:
    """Normalizes a mean embedding ``(d,)`` to a direction: a unit vector ``(d,)``.

    Raises:
        ValueError: if the norm is 0 or NaN.
    """
    norm = mean.norm()
    if not norm > 0:
        raise ValueError(
            f"expected a mean embedding with positive norm, got norm {norm.item()}; check the reward's weights"
        )
    return mean / norm


def common_direction(text: Tensor) -> Tensor:
    """Returns the common direction ``V`` ``(d,)``: the normalized mean of text embeddings ``(n, d)``.

    The definition is that of LongAlign (arXiv 2410.11817, section 3.2). For Denscore, each row is the mean of the unit
    embeddings of a prompt's segments, e.g. its sentences.

    Raises:
        ValueError: if ``text`` has a different shape or no rows, or its mean is 0.
    """
    if text.ndim != 2 or not len(text):
        raise ValueError(
            f"expected text embeddings (n, d) with n > 0, got shape {tuple(text.shape)}; pass one row per prompt"
        )
    return normalize(text.mean(0))


def eta(text: Tensor, direction: Tensor) -> Tensor:
    """Returns the components ``(b,)`` of embeddings ``(b, d)`` along a unit vector ``direction`` ``(d,)``."""
    return (text * direction).sum(-1)


def perpendicular(text: Tensor, direction: Tensor) -> Tensor:
    """Returns the part ``(b, d)`` of embeddings ``(b, d)`` orthogonal to a unit vector ``direction`` ``(d,)``."""
    return reweight(text, direction, 0.0)


def reweight(text: Tensor, direction: Tensor, omega: float) -> Tensor:
    """Scales the component of text embeddings ``C_P`` along a direction ``V`` by ``omega``.

    Returns ``C_P - (1 - omega) eta V``, shape ``(b, d)``, with ``eta = C_P . V`` (LongAlign, arXiv 2410.11817,
    section 4).

    Args:
        text: ``(b, d)`` text embeddings ``C_P``.
        direction: ``(d,)`` unit vector ``V``.
        omega: factor of the component. 1 returns ``text`` exactly; 0 returns the part of ``text`` orthogonal to ``V``.
    """
    return text - (1 - omega) * eta(text, direction)[:, None] * direction


def decompose(image: Tensor, text: Tensor, direction: Tensor) -> Decomposition:
    """Decomposes scores, the dot products of image and text embeddings (LongAlign, arXiv 2410.11817, section 4).

    Args:
        image: ``(b, d)`` unit embeddings of the images.
        text: ``(b, d)`` text embeddings of the images' prompts.
        direction: ``(d,)`` common direction ``V``, a unit vector.
    """
    component = eta(text, direction)
    irrelevant = (image * direction).sum(-1) * component
    return Decomposition((image * perpendicular(text, direction)).sum(-1), irrelevant, component)


def strict_relevance(image: Tensor, text: Tensor, direction: Tensor) -> Tensor:
    """Returns the cosine ``(b,)`` of image embedding and the part of the text embedding orthogonal to a direction.

    With Denscore's embeddings and the common direction, this is the metric Denscore-O of LongAlign (arXiv 2410.11817).
    If a text embedding is parallel to the direction, the cosine is 0.

    Args:
        image: ``(b, d)`` unit embeddings of the images.
        text: ``(b, d)`` text embeddings of the images' prompts.
        direction: ``(d,)`` unit vector.
    """
    return (image * F.normalize(perpendicular(text, direction), dim=-1)).sum(-1)


def running_mean(mean: Tensor, count: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Updates a mean with new rows, with equal weight for all previous and new rows.

    Args:
        mean: ``(d,)`` mean of the previous rows; ignored if ``count`` is 0.
        count: ``()`` integer number of previous rows.
        batch: ``(n, d)`` new rows.

    Returns:
        The new mean ``(d,)`` and the new count ``()``.
    """
    total = count + len(batch)
    return mean + (batch - mean).sum(0) / total, total
