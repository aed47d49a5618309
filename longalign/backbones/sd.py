"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet with cross-attention in the latent space of a VAE."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from longalign.backbones.configs import SDConfig
from longalign.backbones.latent import LatentBackbone, load_parts
from longalign.diffusion import NoiseLevels, check_linear_sampling
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime, resolve_checkpoint


class SDBackbone(LatentBackbone):
    """A UNet conditioned by cross-attention alone, and its VAE.

    Args:
        unet: the denoiser.
        vae: frozen here.
        alphas_cumprod: ``(T,)``.
        prediction: ``"epsilon"`` or ``"v_prediction"``.
    """

    def __init__(self, unet: Any, vae: Any, alphas_cumprod: Tensor, prediction: str):
        self._check(unet, vae)
        super().__init__(unet, vae, prediction, NoiseLevels.from_alphas_cumprod(alphas_cumprod.float()))

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
        unet, vae, constants = load_parts(config, runtime, UNet2DConditionModel, "unet")
        alphas_cumprod, prediction = scheduler_constants(constants)
        return cls(unet, vae, alphas_cumprod, prediction).to(runtime.device)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        conditioning = conditioning.at(timesteps)
        self.check_width(conditioning)
        dtype = self.denoiser.dtype
        output = denoiser(
            latents.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
            **self.extra_model_kwargs(conditioning, latents),
        )[0]
        return output.to(latents.dtype)

    def extra_model_kwargs(self, conditioning: Conditioning, latents: Tensor) -> dict[str, Any]:
        """What the UNet is told beside the states, as keyword arguments: nothing for this family."""
        return {}

    def check_width(self, conditioning: Conditioning) -> None:
        """Raises ValueError if the states are not of the width that the UNet's cross-attention takes."""
        expected = self.denoiser.config.cross_attention_dim
        if conditioning.states.shape[-1] != expected:
            raise ValueError(
                f"the UNet's cross-attention takes states of width {expected}, the encoder gives "
                f"width {conditioning.states.shape[-1]}; choose its own encoder, or one with an adapter to its width"
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
    check_linear_sampling({**config, **scheduler.config})
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"'sd' expects a scheduler with cumulated alphas, and {name} has none; for Stable Diffusion 3 use 'sd3'"
        )
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
