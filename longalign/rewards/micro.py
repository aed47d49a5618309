"""Runs a network on a few images at a time, so that the activations of only these are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def micro_batched(
    function: Callable[..., Tensor], size: int | None, images: Tensor, *rows: Sequence[Any], trainable: bool = False
) -> Tensor:
    """Calls ``function(images, *rows)`` on micro-batches and concatenates the results along the first dimension.

    If gradient is needed and there are several micro-batches, each call is recomputed in the backward pass (gradient
    checkpointing). The gradient is that of a single call.

    Args:
        function: maps the images and rows of a micro-batch to a tensor with one row per image.
        size: number of images per micro-batch; None: all images in one call.
        images: ``(b, ...)``, one row per image, e.g. pixels or states.
        rows: further arguments of length b, e.g. texts.
        trainable: whether parameters that ``function`` uses need gradient. If so, the recomputed call samples the same
            random numbers as the first call, e.g. for dropout.
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
