"""Interface of adapters, the trainable last step of an encoder."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from longalign.encoders.base import Conditioning


class Adapter(nn.Module):
    """Maps the states of a frozen text model to the width of a denoiser.

    An encoder with an adapter can be cached if its config sets `EncoderConfig.adapter_key`.
    """

    #: width of the mapped states
    out_dim: int

    def forward(self, states: Tensor) -> Tensor:
        """Maps states ``(b, n, d)`` to ``(b, n, out_dim)``, each position separately."""
        raise NotImplementedError


def adapt(adapter: Adapter, conditioning: Conditioning) -> Conditioning:
    """Applies an adapter to a language model's conditioning. Masked states of the result are zero."""
    states = adapter(conditioning.states.to(next(adapter.parameters()).dtype))
    return replace(conditioning, states=states if conditioning.mask is None else states * conditioning.mask[..., None])
