"""Counts the floating-point operations of a denoiser's calls, from shapes only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longalign.encoders.base import Conditioning

#: numbers of text states at which operations are counted; other numbers are extrapolated
LENGTHS = (64, 128)


class FlopCount:
    """Adds up the floating-point operations of denoiser calls; a multiply-add counts as two operations.

    LoRAs are not counted. Keys and values of the text count in every call, even if they were computed before. A call
    with gradient also counts its backward pass. The operations are counted once per image size, on meta tensors with
    one image. They are then scaled by the batch size, and are linear in the number of the text's hidden states.

    Args:
        denoiser: a diffusers network.
        call: `Backbone.call`.
        trains_weights: whether a backward pass computes the gradient of the weights; if False, of the latents only.

    Attributes:
        total: number of operations of all calls so far.

    Raises:
        ValueError: if the denoiser is not a diffusers network, so that it cannot be rebuilt on meta tensors.
    """

    def __init__(self, denoiser: Any, call: Callable[..., Tensor], trains_weights: bool):
        if not isinstance(denoiser, ConfigMixin):
            raise ValueError(
                f"expected a diffusers network to count its operations, got {type(denoiser).__name__}; set loop.mfu to "
                "false"
            )
        self.denoiser, self.call, self.trains_weights = denoiser, call, trains_weights
        self.total = 0.0
        self._counts: dict[Any, tuple[float, float]] = {}

    def add(self, latents: Tensor, conditioning: Conditioning) -> None:
        """Adds to ``total`` one call on latents ``(b, c, h, w)``, with its backward pass if gradient is enabled."""
        self.total += self.of_call(latents, conditioning, torch.is_grad_enabled())

    def of_call(self, latents: Tensor, conditioning: Conditioning, backward: bool) -> float:
        """Returns the number of floating-point operations of one denoiser call on latents ``(b, c, h, w)``.

        If ``backward``, the operations of the backward pass are included.
        """
        pooled = None if conditioning.pooled is None else conditioning.pooled.shape[1:]
        key = latents.shape[1:], conditioning.states.shape[2:], pooled, backward
        if key not in self._counts:
            short, long = (self._count(latents, conditioning, length, backward) for length in LENGTHS)
            slope = (long - short) / (LENGTHS[1] - LENGTHS[0])
            self._counts[key] = short - slope * LENGTHS[0], slope
        constant, slope = self._counts[key]
        return len(latents) * (constant + slope * conditioning.states.shape[1])

    @cached_property
    def _meta(self) -> Any:
        with torch.device("meta"):
            network: Any = type(self.denoiser).from_config(self.denoiser.config)
        return network.to(self.denoiser.dtype).requires_grad_(self.trains_weights)

    def _count(self, latents: Tensor, conditioning: Conditioning, length: int, backward: bool) -> float:
        def empty(*shape: int) -> Tensor:
            return torch.empty(1, *shape, device="meta")

        pooled = None if conditioning.pooled is None else empty(*conditioning.pooled.shape[1:])
        text = Conditioning(empty(length, *conditioning.states.shape[2:]), pooled=pooled)
        inputs = empty(*latents.shape[1:]).requires_grad_(backward)
        timesteps = torch.zeros(1, dtype=torch.long, device="meta")
        with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            output = self.call(self._meta, inputs, timesteps, text)
            if backward:
                output.sum().backward()
        return float(counter.get_total_flops())
