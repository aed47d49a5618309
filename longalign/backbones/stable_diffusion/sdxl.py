"""Stable Diffusion XL (arXiv 2307.01952): a UNet also conditioned on a pooled embedding, image size and crop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.backbones.stable_diffusion.sd import SDBackbone
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime


class SDXLBackbone(SDBackbone):
    """SDXL's UNet and VAE.

    Besides the text, the UNet is conditioned on six numbers in pixels (arXiv 2307.01952, section 2.2): the original
    height and width of an image, the top and left of the crop, and the current height and width. As by default in
    diffusers' pipeline, the original size equals the current size and the crop starts at 0, 0. The arguments are those
    of `SDBackbone`.
    """

    @staticmethod
    def _check(unet: Any, vae: Any) -> None:
        if unet.config.addition_embed_type != "text_time" or unet.config.class_embed_type:
            raise ValueError(
                "'sdxl' expects a UNet with addition_embed_type 'text_time' and no class_embed_type, as in Stable "
                f"Diffusion XL, got {unet.config.addition_embed_type} and {unet.config.class_embed_type}; for Stable "
                "Diffusion 1.x and 2.x use the backbone 'sd'"
            )
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ValueError(
                "'sdxl' expects a VAE without latents_mean in its config, got one that normalizes latents per channel; "
                "use SDXL's VAE"
            )

    @classmethod
    def from_config(cls, config: StableDiffusionConfig, runtime: Runtime) -> SDXLBackbone:
        """Loads UNet, VAE and scheduler config; a VAE with ``force_upcast`` is float32 instead of float16."""
        backbone: Any = super().from_config(config, runtime)
        if backbone.vae.dtype == torch.float16 and backbone.vae.config.force_upcast:
            backbone.vae.float()
        return backbone

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding that the UNet expects.

        The embeddings of image size and crop, which the UNet adds itself, do not count.
        """
        config = self.denoiser.config
        return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def extra_model_kwargs(self, conditioning: Conditioning, latents: Tensor) -> dict[str, Any]:
        """Returns the UNet's argument ``added_cond_kwargs``.

        It contains the pooled embedding and ``time_ids``, the six numbers that `SDXLBackbone` describes.

        Raises:
            ValueError: if the pooled embedding is missing or has the wrong width.
        """
        if conditioning.pooled is None or conditioning.pooled.shape[-1] != self.pooled_width:
            got = "none" if conditioning.pooled is None else f"one of width {conditioning.pooled.shape[-1]}"
            raise ValueError(
                f"SDXL's UNet expects a pooled embedding of width {self.pooled_width} but the encoder gives {got}; "
                "use the encoder 'clip-segment-sdxl'"
            )
        # filled on the device: copying a list to it would wait for the device
        time_ids = torch.zeros(len(latents), 6, device=latents.device)
        for i, side in enumerate(latents.shape[-2:]):
            time_ids[:, i::4] = self.vae_scale_factor * side
        return {"added_cond_kwargs": {"text_embeds": conditioning.pooled.to(self.denoiser.dtype), "time_ids": time_ids}}
