"""Config of the backbone `sana`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.backbones.config import SampleSizeConfig


class SanaConfig(SampleSizeConfig):
    """Sana, Sana-1.5, or any model with the same layout: linear attention, and cross-attention to Gemma's output.

    Its encoder is ``llm`` with the model's checkpoint, the model's prompt template, ``lowercase: true`` and
    ``prefix: first``.
    """

    target: ClassVar[str] = "longalign.backbones.sana.backbone:SanaBackbone"
    has_pooled: ClassVar[bool | None] = False

    name: Literal["sana"] = "sana"
    checkpoint: str
    """Hub id, e.g. ``Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers``, or local folder in diffusers layout."""

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("caption_channels"), None
