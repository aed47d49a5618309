"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.metrics import MetricConfig


class MyPartConfig(MetricConfig):
    """Fraction of pixels with at least a given brightness. Replace it with your metric."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    name: Literal["my-part"] = "my-part"
    threshold: float = Field(0.5, ge=0, le=1)
    """Minimum brightness of a pixel that counts: the mean of its channels, in [0, 1]."""
