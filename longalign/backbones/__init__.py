"""Backbones: a denoiser in a latent space, its noise levels, and the LoRAs on it.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.backbones.base import Backbone as Backbone
    from longalign.backbones.config import BackboneConfig as BackboneConfig
    from longalign.backbones.config import LoraConfig as LoraConfig
    from longalign.backbones.flow import FlowBackbone as FlowBackbone
    from longalign.backbones.flux.backbone import FluxBackbone as FluxBackbone
    from longalign.backbones.flux.config import FluxConfig as FluxConfig
    from longalign.backbones.flux2.backbone import Flux2Backbone as Flux2Backbone
    from longalign.backbones.flux2.config import Flux2Config as Flux2Config
    from longalign.backbones.latent import LatentBackbone as LatentBackbone
    from longalign.backbones.lora import LoraWeights as LoraWeights
    from longalign.backbones.pixart.backbone import PixArtBackbone as PixArtBackbone
    from longalign.backbones.pixart.config import PixArtConfig as PixArtConfig
    from longalign.backbones.qwen_image.backbone import QwenImageBackbone as QwenImageBackbone
    from longalign.backbones.qwen_image.config import QwenImageConfig as QwenImageConfig
    from longalign.backbones.sana.backbone import SanaBackbone as SanaBackbone
    from longalign.backbones.sana.config import SanaConfig as SanaConfig
    from longalign.backbones.stable_diffusion.config import SD3Config as SD3Config
    from longalign.backbones.stable_diffusion.config import SDConfig as SDConfig
    from longalign.backbones.stable_diffusion.config import SDXLConfig as SDXLConfig
    from longalign.backbones.stable_diffusion.config import StableDiffusionConfig as StableDiffusionConfig
    from longalign.backbones.stable_diffusion.sd import SDBackbone as SDBackbone
    from longalign.backbones.stable_diffusion.sd3 import SD3Backbone as SD3Backbone
    from longalign.backbones.stable_diffusion.sdxl import SDXLBackbone as SDXLBackbone
    from longalign.backbones.z_image.backbone import ZImageBackbone as ZImageBackbone
    from longalign.backbones.z_image.config import ZImageConfig as ZImageConfig

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Backbone": "base",
        "BackboneConfig": "config",
        "FlowBackbone": "flow",
        "Flux2Backbone": "flux2.backbone",
        "Flux2Config": "flux2.config",
        "FluxBackbone": "flux.backbone",
        "FluxConfig": "flux.config",
        "LatentBackbone": "latent",
        "LoraConfig": "config",
        "LoraWeights": "lora",
        "PixArtBackbone": "pixart.backbone",
        "PixArtConfig": "pixart.config",
        "QwenImageBackbone": "qwen_image.backbone",
        "QwenImageConfig": "qwen_image.config",
        "SD3Backbone": "stable_diffusion.sd3",
        "SD3Config": "stable_diffusion.config",
        "SDBackbone": "stable_diffusion.sd",
        "SDConfig": "stable_diffusion.config",
        "SDXLBackbone": "stable_diffusion.sdxl",
        "SanaBackbone": "sana.backbone",
        "SanaConfig": "sana.config",
        "StableDiffusionConfig": "stable_diffusion.config",
        "SDXLConfig": "stable_diffusion.config",
        "ZImageBackbone": "z_image.backbone",
        "ZImageConfig": "z_image.config",
    },
)
