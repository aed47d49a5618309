"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.backbones import StableDiffusionConfig


class MyPartConfig(StableDiffusionConfig):
    """Stable Diffusion with scaled text states. Replace it with your model."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    has_pooled: ClassVar[bool | None] = False

    name: Literal["my-part"] = "my-part"
    scale: float = Field(1.0, gt=0)
    """Factor of the encoder's text states."""
