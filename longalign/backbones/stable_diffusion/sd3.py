"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer over text and image, trained with flow matching."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from longalign.backbones.flow import check_joint_conditioning, flow_levels
from longalign.backbones.latent import LatentBackbone
from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels
from longalign.runtime import Runtime


class SD3Backbone(LatentBackbone):
    """SD3's transformer and VAE.

    At timestep t of T, noisy latents are ``(1 - s) x_0 + s n`` with clean latents ``x_0`` and noise ``n``. Here
    ``s = shift u / (1 + (shift - 1) u)`` and ``u = (t + 1) / T`` (arXiv 2403.03206, section 5.3.2, eq. 23). The
    transformer is conditioned on ``T s`` and has no attention mask.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        noise_levels: scales of signal and noise at each training timestep; see `flow_levels`.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels.
    """

    def __init__(self, transformer: Any, vae: Any, noise_levels: NoiseLevels):
        config, channels = transformer.config, vae.config.latent_channels
        if not config.in_channels == transformer.out_channels == channels:
            raise ValueError(
                f"the transformer has {config.in_channels} input and {transformer.out_channels} output channels, but "
                f"the VAE has {channels}; use a text-to-image model in the layout of Stable Diffusion 3"
            )
        super().__init__(transformer, vae, "flow", noise_levels)

    @classmethod
    def from_config(cls, config: StableDiffusionConfig, runtime: Runtime) -> SD3Backbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        transformer, vae, constants = load_parts(config, runtime, SD3Transformer2DModel)
        return cls(transformer, vae, flow_levels(constants)).to(runtime.device)

    @property
    def divisor(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.check_conditioning(conditioning)
        assert conditioning.pooled is not None
        dtype, times = self.denoiser.dtype, len(self.noise_levels) * self.noise_levels.noise
        output = denoiser(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            timestep=times.to(timesteps.device, torch.float32)[timesteps],
            return_dict=False,
        )[0]
        return output.to(latents.dtype)

    def check_conditioning(self, conditioning: Conditioning) -> None:
        """Raises ValueError if hidden states or pooled embedding have the wrong width, or some states are masked."""
        config = self.denoiser.config
        check_joint_conditioning(
            conditioning,
            config.joint_attention_dim,
            config.pooled_projection_dim,
            transformer="SD3's transformer",
            encoder="clip-segment-sd3",
        )
