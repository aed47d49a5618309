"""What diffusers checkpoints of latent diffusion (arXiv 2112.10752) share, whatever their denoiser: the autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from longalign.backbones.base import Backbone
from longalign.backbones.configs import SDConfig
from longalign.diffusion import NoiseLevels
from longalign.runtime import Runtime, resolve_checkpoint


class LatentBackbone(Backbone):
    """A denoiser in the latent space of diffusers' ``AutoencoderKL``.

    Latents are ``(z - shift_factor) * scaling_factor`` of the autoencoder's own ``z``.

    Args:
        denoiser: a diffusers network with a ``sample_size``.
        vae: frozen here.
        prediction: what the denoiser answers.
        levels: signal and noise at each timestep.
    """

    def __init__(self, denoiser: nn.Module, vae: nn.Module, prediction: str, levels: NoiseLevels):
        config: Any = denoiser.config
        settings: Any = vae.config
        factor = 2 ** (len(settings.block_out_channels) - 1)
        super().__init__(denoiser, prediction, levels, int(config.sample_size) * factor)
        self.vae: Any = vae.requires_grad_(False).eval()
        self.factor = factor

    @property
    def divisor(self) -> int:
        """What an image's height and width must be divisible by."""
        return self.factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.resolution, width or self.resolution
        if height % self.divisor or width % self.divisor:
            raise ValueError(f"expected a height and width divisible by {self.divisor}, got {height} x {width}")
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        self.latent_shape(*images.shape[-2:])
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        told = self.vae.encode(pixels).latent_dist
        # in one memory layout, in which noise of this shape is then drawn, whatever the convolutions chose
        return torch.cat([told.mean, told.std], dim=1).contiguous()

    def draw_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, std = posterior.to(self.device).chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return ((mean + std * noise).float() - self._shift) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self._shift
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0


def load_parts(config: SDConfig, runtime: Runtime, kind: Any, component: str) -> tuple[Any, Any, dict[str, Any]]:
    """Denoiser, autoencoder and the scheduler's constants of a checkpoint in diffusers layout.

    Args:
        config: where the checkpoint is, and the denoiser's dtype.
        runtime: the autoencoder's dtype.
        kind: the denoiser's class.
        component: the folder that it is in.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    where: dict[str, Any] = {"revision": config.revision}
    denoiser = kind.from_pretrained(
        checkpoint, subfolder=component, variant=config.variant, torch_dtype=getattr(torch, config.dtype), **where
    )
    vae = AutoencoderKL.from_pretrained(
        checkpoint, subfolder="vae", variant=config.variant, torch_dtype=runtime.torch_dtype, **where
    )
    constants: Any = DDIMScheduler.load_config(checkpoint, subfolder="scheduler", **where)
    return denoiser, vae, constants
