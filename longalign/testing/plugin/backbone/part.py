"""The backbone `my-part`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from my_plugin.config import MyPartConfig
from torch import Tensor

from longalign.backbones import SDBackbone
from longalign.encoders import Conditioning
from longalign.runtime import Runtime


class MyPart(SDBackbone):
    """Stable Diffusion whose text states are multiplied by the factor ``scale``."""

    scale = 1.0

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        """Loads the denoiser and the autoencoder from ``config.checkpoint``."""
        backbone = super().from_config(config, runtime)
        backbone.scale = config.scale
        return backbone

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the prediction of ``denoiser``, the network or a wrapper of it, with scaled text states."""
        scaled = replace(conditioning, states=self.scale * conditioning.states)
        return super().call(denoiser, latents, timesteps, scaled)
