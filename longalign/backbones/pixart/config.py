"""Config of the backbone `pixart`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.backbones.config import SampleSizeConfig


class PixArtConfig(SampleSizeConfig):
    """PixArt-alpha, PixArt-Sigma, or any model with the same layout: a transformer with cross-attention to T5's output.

    Its encoder is ``t5`` with the model's checkpoint, ``mask: true`` and ``max_tokens`` 120 (alpha) or 300 (Sigma).
    """

    target: ClassVar[str] = "longalign.backbones.pixart.backbone:PixArtBackbone"
    has_pooled: ClassVar[bool | None] = False

    name: Literal["pixart"] = "pixart"
    checkpoint: str
    """Hub id, e.g. ``PixArt-alpha/PixArt-XL-2-512x512``, or local folder in diffusers layout."""

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("caption_channels"), None
