"""Keys and values of the text, computed once for all sampling steps.

In cross-attention, keys and values are linear in the hidden states of the text, which are the same in all sampling
steps. In the joint attention of Stable Diffusion 3, they are not: the hidden states change with the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from longalign.backbones.lora_layers import has_dropout
from longalign.encoders.base import Conditioning

#: name of an attention layer -> its keys and values, each ``(b, n, d)`` for n text states and all heads together
KeysValues = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProjectedConditioning(Conditioning):
    """A conditioning with the keys and values that a denoiser computes from the hidden states of the text.

    Attributes:
        keys_values: name of each cross-attention layer -> its pair (keys, values).
        with_gradient: whether keys and values were computed with gradient. If not, denoiser calls with gradient ignore
            them and compute new ones.
    """

    keys_values: KeysValues = field(default_factory=dict)
    with_gradient: bool = False


class TextAttention(AttnProcessor2_0):
    """Attention processor of diffusers that uses precomputed keys and values of the text, if given for its layer.

    Args:
        name: name of the attention layer in the UNet.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        if keys_values is None or self.name not in keys_values:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        projected = (attn.to_q(hidden_states), *keys_values[self.name])
        query, key, value = (rearrange(x, "b n (h d) -> b h n d", h=attn.heads) for x in projected)
        mask = None if attention_mask is None else rearrange(attention_mask, "b 1 n -> b 1 1 n")
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        linear, dropout = attn.to_out
        return dropout(linear(rearrange(out, "b h n d -> b n (h d)")))


def use_text_attention(unet: Any) -> None:
    """Sets `TextAttention` in all attention layers of a UNet.

    Does nothing if the UNet projects the hidden states of the text before its attention layers. Does nothing either if
    its attention layers are not those of Stable Diffusion's transformer blocks.
    """
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    if unet.config.encoder_hid_dim_type is None and all(map(_is_plain, layers.values())):
        for name, layer in layers.items():
            processor: Any = TextAttention(name)
            layer.set_processor(processor)


def _is_plain(layer: Any) -> bool:
    extras = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "residual_connection")
    changed = any(getattr(layer, key, None) for key in extras) or layer.rescale_output_factor != 1
    return type(layer.processor) is AttnProcessor2_0 and not changed


def project_text(unet: nn.Module, conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """Computes the keys and values of the text in all cross-attention layers, with the UNet's current weights.

    Args:
        unet: a UNet.
        conditioning: conditioning with the hidden states of the text.
        dtype: dtype to which the hidden states are cast first.

    Returns:
        A `ProjectedConditioning`, or ``conditioning`` itself if keys and values cannot be reused. This is so if the
        conditioning is of a subclass of `Conditioning`, which may depend on the timestep, if a projection has active
        dropout, or if an attention layer does not use `TextAttention`; see `use_text_attention`.
    """
    attention = [(name, module) for name, module in unet.named_modules() if isinstance(module, Attention)]
    if not all(isinstance(layer.processor, TextAttention) for _, layer in attention):
        return conditioning
    layers: dict[str, Any] = {name: layer for name, layer in attention if layer.is_cross_attention}
    projections = [projection for layer in layers.values() for projection in (layer.to_k, layer.to_v)]
    if type(conditioning) is not Conditioning or any(map(has_dropout, projections)):
        return conditioning
    states = conditioning.states.to(dtype)
    keys_values = {name: (layer.to_k(states), layer.to_v(states)) for name, layer in layers.items()}
    fields = {key: getattr(conditioning, key) for key in ("states", "mask", "pooled", "reports")}
    return ProjectedConditioning(**fields, keys_values=keys_values, with_gradient=torch.is_grad_enabled())
