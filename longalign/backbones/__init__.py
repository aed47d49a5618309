"""Backbones: a denoiser in a latent space, its noise levels, and the LoRAs on it.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longalign.backbones.base import Backbone as Backbone
    from longalign.backbones.config import BackboneConfig as BackboneConfig
    from longalign.backbones.config import LoraConfig as LoraConfig
    from longalign.backbones.latent import LatentBackbone as LatentBackbone
    from longalign.backbones.lora import LoraWeights as LoraWeights
    from longalign.backbones.stable_diffusion.sd import SDBackbone as SDBackbone
    from longalign.backbones.stable_diffusion.sd3 import SD3Backbone as SD3Backbone
    from longalign.backbones.stable_diffusion.sdxl import SDXLBackbone as SDXLBackbone

_MODULES = {
    "Backbone": "base",
    "BackboneConfig": "config",
    "LatentBackbone": "latent",
    "LoraConfig": "config",
    "LoraWeights": "lora",
    "SD3Backbone": "stable_diffusion.sd3",
    "SDBackbone": "stable_diffusion.sd",
    "SDXLBackbone": "stable_diffusion.sdxl",
}

__all__ = [
    "Backbone",
    "BackboneConfig",
    "LatentBackbone",
    "LoraConfig",
    "LoraWeights",
    "SD3Backbone",
    "SDBackbone",
    "SDXLBackbone",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
