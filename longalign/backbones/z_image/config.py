"""Config of the backbone `z-image`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.backbones.config import ImageSizeConfig


class ZImageConfig(ImageSizeConfig):
    """Z-Image, Z-Image-Turbo, or any model with the same layout: a transformer trained with flow matching.

    Its encoder is ``llm`` with the model's checkpoint and ``layer: -2``. Z-Image-Turbo is sampled without guidance: set
    the trainer's key ``guidance`` and the command-line option ``--guidance`` to 1. A guidance scale s of diffusers'
    Z-Image pipeline is 1 + s here.
    """

    target: ClassVar[str] = "longalign.backbones.z_image.backbone:ZImageBackbone"
    has_pooled: ClassVar[bool | None] = False
    uncapturable: ClassVar[str] = "takes prompts of different lengths without padding"

    name: Literal["z-image"] = "z-image"
    checkpoint: str
    """Hub id, e.g. ``Tongyi-MAI/Z-Image-Turbo``, or local folder in diffusers layout."""

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("cap_feat_dim"), None
