"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet with cross-attention in the latent space of a VAE."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.backbones.configs import SDConfig
from longalign.diffusion import refuse_nonlinear
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime, resolve_checkpoint


class SDBackbone(Backbone):
    """A UNet conditioned by cross-attention alone, and its VAE.

    Args:
        unet: the denoiser.
        vae: frozen here; its ``scaling_factor`` and ``shift_factor`` are honoured.
        alphas_cumprod: ``(T,)``.
        prediction: ``"epsilon"`` or ``"v_prediction"``.
    """

    def __init__(self, unet: Any, vae: Any, alphas_cumprod: Tensor, prediction: str):
        self._check(unet, vae)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(unet, prediction, alphas_cumprod, int(unet.config.sample_size) * factor)
        self.vae: Any = vae.requires_grad_(False).eval()
        self.factor = factor

    @staticmethod
    def _check(unet: Any, vae: Any) -> None:
        if unet.config.addition_embed_type or unet.config.class_embed_type:
            raise ValueError(
                f"this UNet takes more than a text conditioning (addition_embed_type="
                f"{unet.config.addition_embed_type}, class_embed_type={unet.config.class_embed_type}); 'sd' expects "
                "the layout of Stable Diffusion 1.x or 2.x"
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE has {vae.config.latent_channels}; "
                "'sd' expects a text-to-image model, not one for inpainting or upscaling"
            )

    @classmethod
    def from_config(cls, config: SDConfig, runtime: Runtime) -> SDBackbone:
        """Loads UNet, VAE and the scheduler's constants from a folder or the hub."""
        checkpoint = resolve_checkpoint(config.checkpoint)
        where: dict[str, Any] = {"revision": config.revision}
        unet = UNet2DConditionModel.from_pretrained(
            checkpoint, subfolder="unet", variant=config.variant, torch_dtype=getattr(torch, config.dtype), **where
        )
        vae = AutoencoderKL.from_pretrained(
            checkpoint, subfolder="vae", variant=config.variant, torch_dtype=runtime.torch_dtype, **where
        )
        constants: Any = DDIMScheduler.load_config(checkpoint, subfolder="scheduler", **where)
        alphas_cumprod, prediction = scheduler_constants(constants)
        return cls(unet, vae, alphas_cumprod, prediction).to(runtime.device)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.resolution, width or self.resolution
        if height % self.factor or width % self.factor:
            raise ValueError(f"expected a height and width divisible by {self.factor}, got {height} x {width}")
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.latent_shape(*images.shape[-2:])
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample(generator).float()
        return (latents - self._shift) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self._shift
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        told = conditioning.at(timesteps)
        self.check_width(told)
        dtype = self.denoiser.dtype
        output = denoiser(
            latents.to(dtype),
            timesteps,
            encoder_hidden_states=told.states.to(dtype),
            encoder_attention_mask=told.mask,
            return_dict=False,
            **self.added(told, latents),
        )[0]
        return output.to(latents.dtype)

    def added(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """What the UNet is told beside the states, as keyword arguments: nothing for this family."""
        return {}

    def check_width(self, told: Conditioning) -> None:
        """Raises ValueError if the states are not of the width that the UNet's cross-attention takes."""
        expected = self.denoiser.config.cross_attention_dim
        if told.states.shape[-1] != expected:
            raise ValueError(
                f"the UNet's cross-attention takes states of width {expected}, the encoder gives width "
                f"{told.states.shape[-1]}; choose the encoder of this model, or one with an adapter to its width"
            )


def scheduler_constants(config: dict[str, Any]) -> tuple[Tensor, str]:
    """Cumulated alphas ``(T,)`` and the kind of prediction, from a diffusers scheduler config.

    Raises:
        ValueError: if the scheduler is unknown, has no cumulated alphas, or clips what it predicts.
    """
    name = config.get("_class_name", "DDIMScheduler")
    scheduler_class: Any = getattr(diffusers, name, None)
    if scheduler_class is None:
        raise ValueError(f"diffusers has no scheduler '{name}', which scheduler_config.json names")
    scheduler = scheduler_class.from_config(config)
    refuse_nonlinear({**config, **scheduler.config})
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"'sd' expects a scheduler with cumulated alphas, and {name} has none; is this a flow model?")
    return scheduler.alphas_cumprod, scheduler.config.get("prediction_type", "epsilon")


def empty_unet(checkpoint: str, settings: dict[str, Any] | None = None, revision: str | None = None) -> Any:
    """A checkpoint's UNet on the meta device: its layers and shapes without their weights.

    Args:
        checkpoint: hub id or local folder, of which only ``unet/config.json`` is read.
        settings: its config where that is known, so that nothing is read.
        revision: branch, tag or commit on the hub.
    """
    if settings is None:
        config: Any = UNet2DConditionModel.load_config(
            resolve_checkpoint(checkpoint), subfolder="unet", revision=revision
        )
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)
