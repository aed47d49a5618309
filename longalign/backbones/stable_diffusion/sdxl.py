"""Stable Diffusion XL (arXiv 2307.01952): a UNet also conditioned on a pooled embedding, image size and crop."""

from __future__ import annotations

from typing import Any

import torch
from einops import repeat
from torch import Tensor

from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.backbones.stable_diffusion.sd import SDBackbone
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime


class SDXLBackbone(SDBackbone):
    """SDXL's UNet and VAE.

    Besides the text, the UNet is conditioned on six numbers (section 2.2 of the paper): an image's original height and
    width, the top and left of its crop, and its current height and width. Here the original size equals the current
    size and the crop starts at 0, 0, which is the default of diffusers' pipeline.
    """

    @staticmethod
    def _check(unet: Any, vae: Any) -> None:
        if unet.config.addition_embed_type != "text_time" or unet.config.class_embed_type:
            raise ValueError(
                f"this UNet takes addition_embed_type={unet.config.addition_embed_type}; 'sdxl' expects 'text_time', "
                "the layout of Stable Diffusion XL. Did you mean the backbone 'sd'?"
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE has {vae.config.latent_channels}; "
                "'sdxl' expects a text-to-image model, not one for inpainting or upscaling"
            )
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ValueError("this VAE normalises latents per channel, which 'sdxl' does not support; use SDXL's VAE")

    @classmethod
    def from_config(cls, config: StableDiffusionConfig, runtime: Runtime) -> SDXLBackbone:
        """As for ``sd``; a VAE with ``force_upcast`` runs in float32 instead of float16, in which it overflows."""
        backbone: Any = super().from_config(config, runtime)
        if backbone.vae.dtype == torch.float16 and backbone.vae.config.force_upcast:
            backbone.vae.float()
        return backbone

    @property
    def pooled_width(self) -> int:
        """Width of the UNet's pooled embedding, i.e. without the embeddings of the six sizes."""
        config = self.denoiser.config
        return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def extra_model_kwargs(self, conditioning: Conditioning, latents: Tensor) -> dict[str, Any]:
        """The pooled embedding, and the time ids of an uncropped image at its true size."""
        if conditioning.pooled is None or conditioning.pooled.shape[-1] != self.pooled_width:
            got = "none" if conditioning.pooled is None else f"one of width {conditioning.pooled.shape[-1]}"
            raise ValueError(
                f"SDXL's UNet takes a pooled embedding of width {self.pooled_width} and the encoder gives {got}; "
                "choose the encoder 'clip-segment-sdxl'"
            )
        height, width = (self.vae_scale_factor * side for side in latents.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=latents.device)
        time_ids = repeat(sizes, "size -> b size", b=len(latents))
        return {"added_cond_kwargs": {"text_embeds": conditioning.pooled.to(self.denoiser.dtype), "time_ids": time_ids}}
