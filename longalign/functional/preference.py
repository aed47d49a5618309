"""Decomposition of preference scores into a text-relevant and a text-irrelevant part (LongAlign, paper 3.2 and 4).

A CLIP-style score is ``s = C_X(x) . C_P(p)``, with image embedding ``C_X`` and text embedding ``C_P``. Text embeddings
share a common direction, the unit vector ``V``, so that ``C_P = C_P_perp + eta V`` with ``eta = C_P . V``. The
text-relevant part ``C_X . C_P_perp`` depends on the text. The text-irrelevant part ``C_X . eta V`` measures
prompt-independent preference, e.g. aesthetics. Dot products are computed as element-wise sums rather than matrix
products, which autocast would compute in lower precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Decomposition:
    """Decomposed scores; ``relevant + irrelevant`` is the original score.

    See the module's documentation for image embedding ``C_X``, text embedding ``C_P`` and common direction ``V``.

    Attributes:
        relevant: ``(b,)`` text-relevant part ``C_X . C_P_perp``.
        irrelevant: ``(b,)`` text-irrelevant part ``C_X . eta V``.
        eta: ``(b,)`` component ``C_P . V`` of the text embedding along ``V``.
    """

    relevant: Tensor
    irrelevant: Tensor
    eta: Tensor


def normalize(mean: Tensor) -> Tensor:
    """Normalizes a mean embedding ``(d,)`` to a direction, such as ``V``, shape ``(d,)``.

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
    """Returns ``V``, the normalized mean ``(d,)`` of text embeddings ``(n, d)`` (paper 3.2).

    For Denscore, each row is the mean of a prompt's unit segment embeddings.
    """
    if text.ndim != 2 or not len(text):
        raise ValueError(f"expected text embeddings (n, d) with n > 0, got shape {tuple(text.shape)}")
    return normalize(text.mean(0))


def eta(text: Tensor, direction: Tensor) -> Tensor:
    """Returns ``eta = C_P . V``, ``(b,)``: the component of embeddings ``(b, d)`` along the unit direction ``(d,)``."""
    return (text * direction).sum(-1)


def perpendicular(text: Tensor, direction: Tensor) -> Tensor:
    """Returns ``C_P_perp = C_P - eta V``, the part ``(b, d)`` of the embeddings orthogonal to the direction."""
    return reweight(text, direction, 0.0)


def reweight(text: Tensor, direction: Tensor, omega: float) -> Tensor:
    """Returns ``C_P_perp + omega eta V = C_P - (1 - omega) eta V``, shape ``(b, d)`` (paper section 4).

    Args:
        text: embeddings ``C_P``, ``(b, d)``.
        direction: unit vector ``V``, ``(d,)``.
        omega: factor of the text-irrelevant part. 1 returns ``text`` exactly; 0 returns ``C_P_perp``.
    """
    return text - (1 - omega) * eta(text, direction)[:, None] * direction


def decompose(image: Tensor, text: Tensor, direction: Tensor) -> Decomposition:
    """Decomposes scores, the dot products of image and text embeddings, along a direction (paper section 4).

    Args:
        image: ``(b, d)`` unit embeddings of the images.
        text: ``(b, d)`` embeddings of their prompts.
        direction: ``(d,)`` unit vector ``V``.
    """
    component = eta(text, direction)
    irrelevant = (image * direction).sum(-1) * component
    return Decomposition((image * perpendicular(text, direction)).sum(-1), irrelevant, component)


def strict_relevance(image: Tensor, text: Tensor, direction: Tensor) -> Tensor:
    """Returns ``C_X . C_P_perp / |C_P_perp|``, shape ``(b,)``.

    With Denscore's embeddings, this is the paper's metric Denscore-O. If a text embedding is parallel to the
    direction, the score is 0.
    """
    return (image * F.normalize(perpendicular(text, direction), dim=-1)).sum(-1)


def running_mean(mean: Tensor, count: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Updates a mean with new rows. All rows have equal weight.

    Args:
        mean: ``(d,)`` mean of the previous rows; ignored if ``count`` is 0.
        count: ``()`` integer number of previous rows.
        batch: ``(n, d)`` new rows.

    Returns:
        The new mean ``(d,)`` and the new count ``()``.
    """
    total = count + len(batch)
    return mean + (batch - mean).sum(0) / total, total
