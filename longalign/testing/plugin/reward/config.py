"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.rewards import RewardConfig


class MyPartConfig(RewardConfig):
    """Rewards images of a given brightness. Replace it with your reward."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    name: Literal["my-part"] = "my-part"
    brightness: float = Field(0.6, ge=0, le=1)
    """Mean pixel value of the image with the highest score, in [0, 1]."""
