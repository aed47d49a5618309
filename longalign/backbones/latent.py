"""Latent diffusion backbones (arXiv 2112.10752): encoding and decoding of images with the VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from longalign.backbones.base import Backbone
from longalign.functional.diffusion import NoiseLevels
from longalign.functional.images import ImageCheck


class LatentBackbone(Backbone):
    """A denoiser in the latent space of diffusers' ``AutoencoderKL``.

    Latents are ``(z - shift_factor) * scaling_factor``, where ``z`` is the autoencoder's latent.

    Args:
        denoiser: a diffusers network.
        vae: the autoencoder; frozen by this class.
        prediction: prediction type of the denoiser.
        noise_levels: scales of signal and noise at each timestep.
        resolution: native width and height in pixels; None computes it from the denoiser's ``sample_size``.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        vae: nn.Module,
        prediction: str,
        noise_levels: NoiseLevels,
        resolution: int | None = None,
    ):
        config: Any = denoiser.config
        settings: Any = vae.config
        vae_scale_factor = 2 ** (len(settings.block_out_channels) - 1)
        native = int(config.sample_size) * vae_scale_factor if resolution is None else resolution
        super().__init__(denoiser, prediction, noise_levels, native)
        self._check_images = ImageCheck()
        self.vae: Any = vae.requires_grad_(False).eval()
        self.vae_scale_factor = vae_scale_factor

    @property
    def divisor(self) -> int:
        """Number of pixels that image height and width must be divisible by."""
        return self.vae_scale_factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.resolution, width or self.resolution
        if height % self.divisor or width % self.divisor:
            raise ValueError(
                f"expected a height and width divisible by {self.divisor}, got {height} x {width}; change the size"
            )
        return self.vae.config.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        self._check_images(images)
        self.latent_shape(*images.shape[-2:])
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        distribution = self.vae.encode(pixels).latent_dist
        # noise sampled in this shape depends on the memory layout; make it independent of the convolutions' choice
        return torch.cat([distribution.mean, distribution.std], dim=1).contiguous()

    def sample_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, std = posterior.to(self.device).chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return ((mean + std * noise).float() - self._shift) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self._shift
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def enable_gradient_checkpointing(self) -> None:
        """Enables gradient checkpointing of the denoiser and the VAE decoder to save memory."""
        super().enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0
