"""FLUX.2: a transformer over text and image tokens, trained with flow matching (arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from einops import rearrange
from torch import Tensor

from longalign.backbones.flow import FlowBackbone, check_unmasked, embedded_guidance, image_positions, pack, unpack
from longalign.backbones.flux2.config import Flux2Config
from longalign.backbones.latent import check_width
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime

GUIDANCE = 4.0
"""Default guidance scale of FLUX.2-dev, as in diffusers' pipeline."""
MAX_TOKENS = 4300
"""Number of image tokens above which the noise levels do not depend on the number of sampling steps."""
TRANSFORMER = "FLUX.2's transformer"


def empirical_mu(tokens: int, num_steps: Tensor) -> Tensor:
    """Returns the logarithm ``mu`` ``(n,)`` of the shift of ``num_steps`` ``(n,)`` sampling steps.

    It is linear in the number of image tokens and in the number of steps. For 200 steps it is the ``mu`` of the
    scheduler's own settings, as for FLUX.1. The constants are those of the published code and of diffusers' pipelines.
    """
    many = 0.00016927 * tokens + 0.45666666  # 200 steps
    if tokens > MAX_TOKENS:
        return torch.full_like(num_steps, many)
    few = 8.73809524e-05 * tokens + 1.89833333  # 10 steps
    return many + (few - many) * (200 - num_steps) / 190


class Flux2Backbone(FlowBackbone):
    """FLUX.2's transformer and VAE.

    A token is a patch of 2 by 2 latents. The transformer is conditioned on the noise level and has no attention mask.
    Latents are normalized by a mean and a standard deviation for each channel and position in a patch, the statistics
    of the VAE's batch normalization. Noise levels depend on the number of tokens and, in sampling, on the number of
    steps; see `empirical_mu`.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        scheduler: config of diffusers' scheduler.
        resolution: native side of square images in pixels.
        guidance: guidance scale that the transformer is conditioned on. None selects 4 if the transformer takes a
            guidance scale.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels, the scheduler is not supported, or
            ``guidance`` is given and the transformer takes none.
    """

    name = "flux2"
    schedule_mu = staticmethod(empirical_mu)

    def __init__(
        self, transformer: Any, vae: Any, scheduler: Mapping[str, Any], *, resolution: int, guidance: float | None
    ):
        config, channels = transformer.config, 4 * vae.config.latent_channels
        if not config.in_channels == transformer.out_channels == vae.bn.num_features == channels:
            raise ValueError(
                f"the transformer has {config.in_channels} input and {transformer.out_channels} output channels and "
                f"the VAE has statistics of {vae.bn.num_features}, but tokens of 2 x 2 latents have {channels}; use a "
                "text-to-image model in the layout of FLUX.2"
            )
        self.guidance = embedded_guidance(config.guidance_embeds, guidance, GUIDANCE)
        super().__init__(transformer, vae, scheduler, resolution=resolution)

    @classmethod
    def from_config(cls, config: Flux2Config, runtime: Runtime) -> Flux2Backbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        parts = load_parts(config, runtime, Flux2Transformer2DModel, AutoencoderKLFlux2)
        return cls(*parts, resolution=config.image_size, guidance=config.guidance).to(runtime.device)

    def normalize(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return (z - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> Tensor:
        """Returns the mean and standard deviation ``(2, c, h, w)`` of the autoencoder's latent."""
        bn = self.vae.bn
        statistics = torch.stack([bn.running_mean, (bn.running_var + bn.eps).sqrt()])
        patches = rearrange(statistics, "s (c p q) -> s c p q", p=2, q=2)
        return patches.to(like).repeat(1, 1, like.shape[-2] // 2, like.shape[-1] // 2)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        config, dtype, device = self.denoiser.config, self.denoiser.dtype, latents.device
        check_width(conditioning, config.joint_attention_dim, transformer=TRANSFORMER, encoder="llm")
        check_unmasked(conditioning, transformer=TRANSFORMER, advice="set the encoder's pad_to to 512")
        height, width = (side // self.patch for side in latents.shape[-2:])
        text_positions = torch.zeros(conditioning.states.shape[1], 4, device=device)
        text_positions[:, 3] = torch.arange(len(text_positions), device=device)
        times = self.noise_at(latents, timesteps)
        output = denoiser(
            hidden_states=pack(latents.to(dtype)),
            encoder_hidden_states=conditioning.states.to(dtype),
            timestep=times,
            guidance=None if self.guidance is None else torch.full_like(times, self.guidance),
            txt_ids=text_positions,
            img_ids=image_positions(height, width, 4, device),
            return_dict=False,
        )[0]
        return unpack(output, latents.shape[-2]).to(latents.dtype)
