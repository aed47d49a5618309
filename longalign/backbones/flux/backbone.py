"""FLUX.1: a transformer over text and image tokens, trained with flow matching (arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from longalign.backbones.flow import (
    FlowBackbone,
    check_joint_conditioning,
    embedded_guidance,
    image_positions,
    pack,
    unpack,
)
from longalign.backbones.flux.config import FluxConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime

GUIDANCE = 3.5
"""Default guidance scale of FLUX.1-dev, as in diffusers' pipeline."""


class FluxBackbone(FlowBackbone):
    """FLUX.1's transformer and VAE.

    A token is a patch of 2 by 2 latents. The transformer is conditioned on the noise level and has no attention mask.
    In FLUX.1-dev, noise levels depend on the number of tokens.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        scheduler: config of the model's diffusers scheduler.
        resolution: native side of square images in pixels.
        guidance: guidance scale that the transformer is conditioned on. None selects 3.5 if the transformer takes a
            guidance scale, as that of FLUX.1-dev does. It must be None if the transformer takes none.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels, the scheduler is not supported, or
            ``guidance`` is given and the transformer takes none.
    """

    name = "flux"

    def __init__(
        self, transformer: Any, vae: Any, scheduler: Mapping[str, Any], *, resolution: int, guidance: float | None
    ):
        config, channels = transformer.config, 4 * vae.config.latent_channels
        if not config.in_channels == transformer.out_channels == channels:
            raise ValueError(
                f"the transformer has {config.in_channels} input and {transformer.out_channels} output channels, but "
                f"tokens of 2 x 2 latents have {channels}; use a text-to-image model in the layout of FLUX.1"
            )
        self.guidance = embedded_guidance(config.guidance_embeds, guidance, GUIDANCE)
        super().__init__(transformer, vae, scheduler, resolution=resolution)

    @classmethod
    def from_config(cls, config: FluxConfig, runtime: Runtime) -> FluxBackbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        transformer, vae, scheduler = load_parts(config, runtime, FluxTransformer2DModel)
        backbone = cls(transformer, vae, scheduler, resolution=config.image_size, guidance=config.guidance)
        return backbone.to(runtime.device)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        config = self.denoiser.config
        check_joint_conditioning(
            conditioning,
            config.joint_attention_dim,
            config.pooled_projection_dim,
            transformer="FLUX's transformer",
            encoder="t5-flux",
        )
        assert conditioning.pooled is not None
        dtype, device, (height, width) = self.denoiser.dtype, latents.device, latents.shape[-2:]
        times = self.noise_at(latents, timesteps)
        output = denoiser(
            hidden_states=pack(latents.to(dtype)),
            encoder_hidden_states=conditioning.states.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            timestep=times,
            guidance=None if self.guidance is None else torch.full_like(times, self.guidance),
            txt_ids=torch.zeros(conditioning.states.shape[1], 3, device=device),
            img_ids=image_positions(height // 2, width // 2, 3, device),
            return_dict=False,
        )[0]
        return unpack(output, height).to(latents.dtype)
