"""LoRA layers of peft with a forward pass that adds the update to the layer's output in one matrix product.

peft casts the input to the dtype of the LoRA, scales the update and adds it, each with a pass over memory. These layers
compute ``y + (x A) (s B)`` as one product with ``y`` as its initial value.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor
from torch.nn import functional as F


def fuse_forward(layer: Any, dropout: float = 0.0) -> None:
    """Gives a new LoRA layer of peft, a linear layer or a convolution, the fused forward pass.

    Args:
        layer: the layer.
        dropout: probability of dropout of the update (``dropout_placement: up``), which peft does not have.
    """
    layer.__class__ = {Linear: FusedLinear, Conv2d: FusedConv2d}[type(layer)]
    layer.dropout_of_update = dropout


def _active_adapter(layer: Any) -> str | None:
    """Returns the name of the only active LoRA, or None if there is none or several."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 and not (layer.disable_adapters or layer.merged) else None


def _cast_for_autocast(x: Tensor) -> Tensor:
    """Casts an input once that the base layer and the LoRA would both cast under autocast."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x


class FusedLinear(Linear):
    """A linear layer with a LoRA."""

    dropout_of_update: float

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _active_adapter(self)
        if name is None:
            return super().forward(x, *args, **kwargs)
        x = _cast_for_autocast(x)
        out = self.base_layer(x)
        down: Any = self.lora_A[name]
        hidden = F.linear(self.lora_dropout[name](x), down.weight.to(x.dtype))
        up = (self.scaling[name] * self.lora_B[name].weight).to(out.dtype)
        if self.training and self.dropout_of_update:
            return out + F.dropout(F.linear(hidden, up), self.dropout_of_update)
        return _add_product(out.flatten(0, -2), hidden.flatten(0, -2), up.t()).view_as(out)


class FusedConv2d(Conv2d):
    """A convolution with a LoRA: a convolution to the rank's channels and a pointwise one."""

    dropout_of_update: float

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _active_adapter(self)
        if name is None:
            return super().forward(x, *args, **kwargs)
        x = _cast_for_autocast(x)
        out = self.base_layer(x)
        down: Any = self.lora_A[name]
        dropped, weight = self.lora_dropout[name](x), down.weight.to(x.dtype)
        hidden = F.conv2d(dropped, weight, None, down.stride, down.padding, down.dilation)
        up = (self.scaling[name] * self.lora_B[name].weight).to(out.dtype)
        if self.training and self.dropout_of_update:
            return out + F.dropout(F.conv2d(hidden, up), self.dropout_of_update)
        up = up[:, :, 0, 0]
        if out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous():
            rows, height = "b c h w -> (b h w) c", out.shape[2]
            added = _add_product(rearrange(out, rows), rearrange(hidden, rows), up.t())
            return rearrange(added, "(b h w) c -> b c h w", b=len(out), h=height)
        pixels, factors = out.flatten(2), (up.expand(len(out), -1, -1), hidden.flatten(2))
        added = torch.baddbmm(pixels, *factors) if torch.is_grad_enabled() else pixels.baddbmm_(*factors)
        return added.view_as(out)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns ``out + a b``; without gradient in place, which saves a copy of ``out``."""
    return torch.addmm(out, a, b) if torch.is_grad_enabled() else out.addmm_(a, b)
