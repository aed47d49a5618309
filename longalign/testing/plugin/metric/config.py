"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.metrics import MetricConfig


class MyPartConfig(MetricConfig):
    """Share of pixels above a given brightness. Replace it with your metric."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    name: Literal["my-part"] = "my-part"
    threshold: float = Field(0.5, ge=0, le=1)
    """Mean of the channels from which a pixel counts."""
