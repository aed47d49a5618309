"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer over text and image, trained with flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from longalign.backbones.flow import FlowBackbone, check_joint_conditioning
from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime


class SD3Backbone(FlowBackbone):
    """SD3's transformer and VAE.

    At timestep t of T, noisy latents are ``(1 - s) x_0 + s n`` with clean latents ``x_0`` and noise ``n``. Here
    ``s = shift u / (1 + (shift - 1) u)`` and ``u = (t + 1) / T`` (arXiv 2403.03206, section 5.3.2, eq. 23). The
    transformer is conditioned on ``T s`` and has no attention mask.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        scheduler: config of diffusers' scheduler.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels, or the scheduler is not supported.
    """

    name = "sd3"

    def __init__(self, transformer: Any, vae: Any, scheduler: Mapping[str, Any]):
        config, channels = transformer.config, vae.config.latent_channels
        if not config.in_channels == transformer.out_channels == channels:
            raise ValueError(
                f"the transformer has {config.in_channels} input and {transformer.out_channels} output channels, but "
                f"the VAE has {channels}; use a text-to-image model in the layout of Stable Diffusion 3"
            )
        self.patch = config.patch_size
        super().__init__(transformer, vae, scheduler, resolution=None)

    @classmethod
    def from_config(cls, config: StableDiffusionConfig, runtime: Runtime) -> SD3Backbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        return cls(*load_parts(config, runtime, SD3Transformer2DModel)).to(runtime.device)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.check_conditioning(conditioning)
        assert conditioning.pooled is not None
        dtype = self.denoiser.dtype
        output = denoiser(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            timestep=len(self.noise_levels) * self.noise_at(latents, timesteps),
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
