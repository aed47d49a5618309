"""LoRA layers of peft with a forward pass that adds the update to the layer's output in one matrix product.

peft casts the input to the dtype of the LoRA, scales the update and adds it, each with a pass over memory. These layers
compute ``y + s (x A) B`` as one product with ``y`` as its initial value. Here ``x`` is the input of the base layer and
``y`` its output. ``A`` is the down projection, ``B`` the up projection and ``s`` the scale of the LoRA. Calls without
gradient can use a temporary copy of the base weight that contains the update.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional as F


def fuse_forward(layer: Any, dropout: float = 0.0) -> None:
    """Replaces the forward pass of a new LoRA layer of peft by that of `FusedLinear` or `FusedConv2d`.

    Args:
        layer: a LoRA layer of peft, linear or convolution.
        dropout: probability of dropout of the LoRA's output, a dropout that peft does not have; see
            `LoraConfig.dropout_placement`.
    """
    layer.__class__ = {Linear: FusedLinear, Conv2d: FusedConv2d}[type(layer)]
    layer.dropout_of_update = dropout
    layer.merged_weight = None


def has_dropout(layer: nn.Module) -> bool:
    """Whether a layer, including its LoRA if it has one, applies dropout in its next call."""
    drops = any(m.training and m.p > 0 for m in layer.modules() if isinstance(m, nn.Dropout))
    return drops or (layer.training and getattr(layer, "dropout_of_update", 0.0) > 0)


def _active_adapter(layer: Any) -> str | None:
    """Returns the name of a layer's active LoRA; None if none or several LoRAs are active, or they are merged."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 and not (layer.disable_adapters or layer.merged) else None


def _cast_for_autocast(x: Tensor) -> Tensor:
    """Casts an input to the dtype of autocast, if enabled, so that base layer and LoRA do not each cast it."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x


class _Fused:
    """Mixin with the forward pass of `FusedLinear` and `FusedConv2d`."""

    #: probability of dropout of the LoRA's update; see `fuse_forward`
    dropout_of_update: float
    #: the base weight plus the LoRA's update; used by calls without gradient in which dropout is inactive
    merged_weight: Tensor | None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _active_adapter(self)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        merged = self.merged_weight
        if merged is not None and not torch.is_grad_enabled() and not self._drops(name):
            return self._merged_forward(x, merged)
        x = _cast_for_autocast(x)
        out = self.base_layer(x)
        down, up = (projection[name].weight.to(out.dtype) for projection in (self.lora_A, self.lora_B))
        hidden, scale = self._project(name, self.lora_dropout[name](x), down), self.scaling[name]
        if self.training and self.dropout_of_update:
            return out + F.dropout(scale * self._expand(hidden, up), self.dropout_of_update)
        return self._add_update(out, hidden, up, scale)

    def _drops(self: Any, name: str) -> bool:
        return self.training and (self.dropout_of_update > 0 or isinstance(self.lora_dropout[name], nn.Dropout))


class FusedLinear(_Fused, Linear):
    """LoRA layer of peft around a linear layer, with a fused forward pass: one product also adds the update."""

    def _merged_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        layer: Any = self.get_base_layer()
        return F.linear(x, weight, layer.bias)

    def _project(self, name: str, x: Tensor, down: Tensor) -> Tensor:
        return F.linear(x, down)

    def _expand(self, hidden: Tensor, up: Tensor) -> Tensor:
        return F.linear(hidden, up)

    def _add_update(self, out: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        return _add_product(out.flatten(0, -2), hidden.flatten(0, -2), up.t(), scale).view_as(out)


class FusedConv2d(_Fused, Conv2d):
    """LoRA layer of peft around a 2D convolution, with a fused forward pass as in `FusedLinear`.

    The down projection is a convolution with ``rank`` output channels, the up projection a 1x1 convolution.
    """

    def _merged_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        layer: Any = self.get_base_layer()
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def _project(self, name: str, x: Tensor, down: Tensor) -> Tensor:
        layer: Any = self.lora_A[name]
        return F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)

    def _expand(self, hidden: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(hidden, up)

    def _add_update(self, out: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        up = up[:, :, 0, 0]
        if out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous():
            rows, height = "b c h w -> (b h w) c", out.shape[2]
            added = _add_product(rearrange(out, rows), rearrange(hidden, rows), up.t(), scale)
            return rearrange(added, "(b h w) c -> b c h w", b=len(out), h=height)
        return _add_product(out.flatten(2), up.expand(len(out), -1, -1), hidden.flatten(2), scale).view_as(out)


def _add_product(out: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns ``out + scale a b`` for matrices or batches of matrices; without gradient, ``out`` is overwritten."""
    add, add_in_place = (torch.addmm, Tensor.addmm_) if out.ndim == 2 else (torch.baddbmm, Tensor.baddbmm_)
    return (add if torch.is_grad_enabled() else add_in_place)(out, a, b, alpha=scale)
