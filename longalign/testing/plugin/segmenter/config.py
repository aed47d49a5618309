"""The config of `my-part`. Neither the config nor the part imports torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.segmenters import SegmenterConfig


class MyPartConfig(SegmenterConfig):
    """Splits a prompt into segments of a fixed number of words. Replace it with your segmenter."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    name: Literal["my-part"] = "my-part"
    words: int = Field(20, ge=1)
    """Number of words in a segment; the last segment may have fewer."""
