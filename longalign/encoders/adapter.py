"""Interface of adapters, the trainable last step of an encoder."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from longalign.encoders.base import Conditioning


class Adapter(nn.Module):
    """Maps the states of a frozen text model to the width of a denoiser.

    An encoder with an adapter can be cached if its config sets `EncoderConfig.adapter_key`. An adapter that maps each
    state separately implements ``forward``; others override `adapt`.
    """

    #: width of the states of the text model
    in_dim: int
    #: width of the mapped states
    out_dim: int

    def forward(self, states: Tensor) -> Tensor:
        """Maps states ``(b, n, d)`` to ``(b, n, out_dim)``, each position separately."""
        raise NotImplementedError

    def adapt(self, conditioning: Conditioning) -> Conditioning:
        """Applies the adapter to a text model's conditioning. Masked states of the result are zero.

        The result may depend on the timestep; see `Conditioning.at`.
        """
        states = self(conditioning.states.to(next(self.parameters()).dtype))
        masked = states if conditioning.mask is None else states * conditioning.mask[..., None]
        return replace(conditioning, states=masked)
