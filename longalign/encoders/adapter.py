"""Interface of adapters: trainable modules that are the last step of an encoder."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from longalign.encoders.base import Conditioning


class Adapter(nn.Module):
    """Base class of adapters: trainable modules that map the states of a frozen text model to a denoiser's width.

    The states of the text model can be cached if the encoder's config class sets
    `longalign.encoders.EncoderConfig.adapter_key`. A subclass that maps each state separately implements ``forward``;
    other subclasses override `adapt`.
    """

    #: width of the text model's states
    in_dim: int
    #: width of the mapped states
    out_dim: int

    def forward(self, states: Tensor) -> Tensor:
        """Maps states ``(b, n, in_dim)`` to ``(b, n, out_dim)``, each position separately."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward, or override adapt")

    def adapt(self, conditioning: Conditioning) -> Conditioning:
        """Returns ``conditioning`` with its states mapped to width ``out_dim``; masked states become zero.

        The states are cast to the adapter's dtype first. A subclass may return a conditioning that depends on the
        timestep; see `Conditioning.at`.
        """
        states = self(conditioning.states.to(next(self.parameters()).dtype))
        masked = states if conditioning.mask is None else states * conditioning.mask[..., None]
        return replace(conditioning, states=masked)
