"""Sana (arXiv 2410.10629): linear attention, and an autoencoder with a high compression (arXiv 2410.10733)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import Tensor

from longalign.backbones.flow import FlowBackbone
from longalign.backbones.latent import check_width
from longalign.backbones.sana.config import SanaConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime


class SanaBackbone(FlowBackbone):
    """Sana's transformer and autoencoder.

    At noise level s, the transformer is conditioned on ``T s timestep_scale``, with T training timesteps and
    ``timestep_scale`` of its config. The autoencoder is deterministic, so the standard deviation of its latents is 0.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        scheduler: config of the model's diffusers scheduler.
        resolution: native side of square images in pixels; None computes it from the transformer's ``sample_size``.

    Raises:
        ValueError: if transformer and autoencoder have different numbers of channels, the transformer takes a guidance
            scale, or the scheduler is not supported.
    """

    name = "sana"

    def __init__(self, transformer: Any, vae: Any, scheduler: Mapping[str, Any], *, resolution: int | None = None):
        config, channels = transformer.config, vae.config.latent_channels
        if config.in_channels != channels or config.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"the transformer has {config.in_channels} input and {config.out_channels} output channels, but the "
                f"autoencoder has {channels}; use a text-to-image model in the layout of Sana"
            )
        if getattr(config, "guidance_embeds", False):
            raise ValueError(
                "'sana' does not support transformers that take a guidance scale, such as Sana-Sprint; use Sana or "
                "Sana-1.5"
            )
        self.patch = config.patch_size
        super().__init__(transformer, vae, scheduler, resolution=resolution)

    @classmethod
    def from_config(cls, config: SanaConfig, runtime: Runtime) -> SanaBackbone:
        """Loads transformer, autoencoder and scheduler config from a folder or the Hub."""
        return cls(*load_parts(config, runtime, SanaTransformer2DModel, AutoencoderDC)).to(runtime.device)

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.vae.encode(pixels).latent
        return latent, torch.zeros_like(latent)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        config, dtype = self.denoiser.config, self.denoiser.dtype
        check_width(conditioning, config.caption_channels, transformer="Sana's transformer", encoder="llm")
        scale = len(self.noise_levels) * getattr(config, "timestep_scale", 1.0)
        output = denoiser(
            latents.to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_attention_mask=conditioning.mask,
            timestep=scale * self.noise_at(latents, timesteps),
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]].to(latents.dtype)
