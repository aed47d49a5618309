"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet with cross-attention in the latent space of a VAE."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from longalign.backbones.latent import LatentBackbone
from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.backbones.text_attention import ProjectedConditioning, project_text, use_text_attention
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels
from longalign.functional.solvers import check_linear_sampling
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.sharding import is_sharded


class SDBackbone(LatentBackbone):
    """Stable Diffusion's UNet and VAE. The UNet is conditioned on the text through cross-attention only.

    Args:
        unet: the denoiser.
        vae: the autoencoder; frozen by this class.
        alphas_cumprod: ``(T,)`` cumulative products of the noise schedule's alphas.
        prediction: prediction type: ``"epsilon"`` or ``"v_prediction"``.

    Raises:
        ValueError: if the UNet has other conditions than text, or UNet and VAE have different numbers of channels.
    """

    def __init__(self, unet: Any, vae: Any, alphas_cumprod: Tensor, prediction: str):
        self._check(unet, vae)
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"the UNet has {unet.config.in_channels} channels at its input, but the VAE has "
                f"{vae.config.latent_channels}; use a text-to-image model, not one for inpainting or upscaling"
            )
        super().__init__(unet, vae, prediction, NoiseLevels.from_alphas_cumprod(alphas_cumprod.float()))
        use_text_attention(unet)

    @staticmethod
    def _check(unet: Any, vae: Any) -> None:
        if unet.config.addition_embed_type or unet.config.class_embed_type:
            raise ValueError(
                "'sd' expects a UNet of Stable Diffusion 1.x or 2.x, conditioned on text only, got addition_embed_type="
                f"{unet.config.addition_embed_type}, class_embed_type={unet.config.class_embed_type}; use the "
                "backbone 'sdxl' for Stable Diffusion XL, or a different checkpoint"
            )

    @classmethod
    def from_config(cls, config: StableDiffusionConfig, runtime: Runtime) -> SDBackbone:
        """Loads UNet, VAE and scheduler config from a folder, the Hub or a single file."""
        unet, vae, constants = load_parts(config, runtime, UNet2DConditionModel)
        alphas_cumprod, prediction = scheduler_constants(constants)
        return cls(unet, vae, alphas_cumprod, prediction).to(runtime.device)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.check_width(conditioning)
        dtype = self.denoiser.dtype
        output = denoiser(
            latents.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
            **self._attention_kwargs(conditioning),
            **self.extra_model_kwargs(conditioning, latents),
        )[0]
        return output.to(latents.dtype)

    def project_text(self, conditioning: Conditioning) -> Conditioning:
        # blocks compiled one by one would be compiled again for each layer, since each uses its own keys and values
        if self._compiled or is_sharded(self.denoiser) or not conditioning.is_static:
            return conditioning
        if torch.is_grad_enabled() and self.denoiser.is_gradient_checkpointing:
            return conditioning
        self.check_width(conditioning)
        with self.autocast():
            return project_text(self.denoiser, conditioning, self.denoiser.dtype)

    @staticmethod
    def _attention_kwargs(conditioning: Conditioning) -> dict[str, Any]:
        if not isinstance(conditioning, ProjectedConditioning):
            return {}
        if torch.is_grad_enabled() and not conditioning.with_gradient:
            return {}
        return {"cross_attention_kwargs": {"keys_values": conditioning.keys_values}}

    def extra_model_kwargs(self, conditioning: Conditioning, latents: Tensor) -> dict[str, Any]:
        """Returns further keyword arguments of the UNet's forward pass: none for Stable Diffusion 1.x and 2.x."""
        return {}

    def check_width(self, conditioning: Conditioning) -> None:
        """Raises ValueError if the width of the text's hidden states does not match the UNet's cross-attention."""
        expected = self.denoiser.config.cross_attention_dim
        if conditioning.states.shape[-1] != expected:
            raise ValueError(
                f"the UNet's cross-attention expects states of width {expected}, got width "
                f"{conditioning.states.shape[-1]} from the encoder; use the model's encoder, or an adapter of width "
                f"{expected}"
            )


def scheduler_constants(config: dict[str, Any]) -> tuple[Tensor, str]:
    """Returns ``alphas_cumprod`` ``(T,)`` and the prediction type of a diffusers scheduler, from its config.

    Raises:
        ValueError: if the scheduler is unknown, has no ``alphas_cumprod``, or clips the predicted image.
    """
    name = config.get("_class_name", "DDIMScheduler")
    scheduler_class: Any = getattr(diffusers, name, None)
    if scheduler_class is None:
        raise ValueError(f"diffusers has no scheduler '{name}'; correct _class_name in scheduler_config.json")
    scheduler = scheduler_class.from_config(config)
    check_linear_sampling({**config, **scheduler.config})
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"'sd' expects a scheduler with alphas_cumprod, but {name} has none; for Stable Diffusion 3 use the "
            "backbone 'sd3'"
        )
    return scheduler.alphas_cumprod, scheduler.config.get("prediction_type", "epsilon")


def empty_unet(checkpoint: str, settings: dict[str, Any] | None = None, revision: str | None = None) -> Any:
    """Builds a checkpoint's UNet on the meta device: layers and shapes without weights.

    Args:
        checkpoint: Hub id or local folder; only ``unet/config.json`` is read.
        settings: config of the UNet, used instead of that of the checkpoint; None reads the checkpoint's.
        revision: branch, tag or commit on the Hub; None for the default branch.
    """
    if settings is None:
        config: Any = UNet2DConditionModel.load_config(
            resolve_checkpoint(checkpoint), subfolder="unet", revision=revision
        )
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)
