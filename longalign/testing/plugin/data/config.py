"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.data import DataConfig


class MyPartConfig(DataConfig):
    """Images of one colour, with captions that name the colour. Replace it with your data."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    name: Literal["my-part"] = "my-part"
    size: int = Field(1000, ge=1)
    """Number of items."""
    resolution: int = Field(64, ge=8)
    """Side of the square images in pixels."""
