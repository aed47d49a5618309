"""Passes over a few images at a time, so that only the activations of one pass are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def micro_batched(
    function: Callable[..., Tensor], size: int | None, images: Tensor, *rows: Sequence[Any], trainable: bool = False
) -> Tensor:
    """Calls ``function(images, *rows)`` on micro-batches and concatenates the results.

    With gradient, each pass is recomputed in the backward pass. The gradient is unchanged.

    Args:
        function: returns one row per image.
        size: number of images per pass; None for all.
        images: one row per image, e.g. pixels.
        rows: further arguments with one item per image, e.g. texts.
        trainable: whether the parameters of ``function`` need gradient.
    """
    if size is None or len(images) <= size:
        return function(images, *rows)
    chunks = [[part[i : i + size] for part in (images, *rows)] for i in range(0, len(images), size)]
    if not (torch.is_grad_enabled() and (images.requires_grad or trainable)):
        return torch.cat([function(*chunk) for chunk in chunks])
    results: list[Any] = [
        checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=trainable) for chunk in chunks
    ]
    return torch.cat(results)
