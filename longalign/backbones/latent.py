"""Latent diffusion backbones (arXiv 2112.10752): encoding and decoding of images with the VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from longalign.backbones.base import Backbone
from longalign.backbones.config import vae_scale_factor
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels
from longalign.functional.images import ImageCheck


class LatentBackbone(Backbone):
    """A denoiser in the latent space of diffusers' ``AutoencoderKL``.

    Latents in the denoiser's scale are ``(z - shift_factor) * scaling_factor``, where ``z`` is the autoencoder's
    latent, and the two constants are in the autoencoder's config. For other autoencoders, override `encode_pixels`,
    `decode_pixels`, `normalize`, `denormalize` or `latent_channels`.

    Args:
        denoiser: a diffusers network.
        vae: the autoencoder; frozen by this class.
        prediction: prediction type of the denoiser: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        noise_levels: scales of signal and noise at each training timestep.
        resolution: native side of square images in pixels; None computes it from the denoiser's ``sample_size``.

    Attributes:
        vae_scale_factor: number of pixels per latent along each side of an image.
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
        factor = vae_scale_factor(settings) or 1
        native = int(config.sample_size) * factor if resolution is None else resolution
        super().__init__(denoiser, prediction, noise_levels, native)
        self._check_images = ImageCheck()
        self.vae: Any = vae.requires_grad_(False).eval()
        self.vae_scale_factor = factor

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.vae.config.latent_channels

    @property
    def divisor(self) -> int:
        """Number of pixels that image height and width must be divisible by."""
        return self.vae_scale_factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.resolution, width or self.resolution
        if height % self.divisor or width % self.divisor:
            raise ValueError(
                f"expected a height and width divisible by {self.divisor}, got {height} x {width} pixels; change the "
                "image size"
            )
        return self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        self._check_images(images)
        self.latent_shape(*images.shape[-2:])
        pixels = (2 * images.to(self.device, non_blocking=True) - 1).to(self.vae.dtype)
        # noise sampled in this shape depends on the memory layout; make it independent of the convolutions' choice
        return torch.cat(self.encode_pixels(pixels), dim=1).contiguous()

    def sample_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, std = posterior.to(self.device, non_blocking=True).chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return self.normalize((mean + std * noise).float())

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.decode_pixels(self.denormalize(latents).to(self.vae.dtype))
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation, each ``(b, c, h', w')``, of the autoencoder's latent.

        ``pixels`` ``(b, 3, h, w)`` are in [-1, 1].
        """
        distribution = self.vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def decode_pixels(self, z: Tensor) -> Tensor:
        """Decodes the autoencoder's latent ``(b, c, h', w')`` to pixels ``(b, 3, h, w)`` in about [-1, 1]."""
        return self.vae.decode(z, return_dict=False)[0]

    def normalize(self, z: Tensor) -> Tensor:
        """Maps the autoencoder's latent ``(b, c, h', w')`` to the scale that the denoiser was trained with."""
        return (z - self._shift) * self.vae.config.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize`: maps latents ``(b, c, h', w')`` to the autoencoder's scale."""
        return latents / self.vae.config.scaling_factor + self._shift

    def enable_gradient_checkpointing(self) -> None:
        """Enables gradient checkpointing of the denoiser and, if the VAE supports it, of the VAE's decoder."""
        super().enable_gradient_checkpointing()
        if getattr(self.vae, "_supports_gradient_checkpointing", True):
            self.vae.enable_gradient_checkpointing()

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0


def check_width(conditioning: Conditioning, width: int | None, *, transformer: str, encoder: str) -> None:
    """Raises ValueError if the states of a conditioning do not have the width that a transformer expects.

    Args:
        conditioning: the conditioning.
        width: the expected width; None accepts any width.
        transformer: name of the transformer, for the message.
        encoder: name of a matching encoder, for the message.
    """
    given = conditioning.states.shape[-1]
    if width not in (None, given):
        raise ValueError(
            f"{transformer} expects states of width {width}, got width {given} from the encoder; use the encoder "
            f"'{encoder}' with the model's checkpoint"
        )
