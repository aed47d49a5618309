"""Config of the backbone `pixart`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.backbones.config import TransformerConfig


class PixArtConfig(TransformerConfig):
    """PixArt-alpha, PixArt-Sigma, or any model with the same layout: a transformer with cross-attention to T5's states.

    The encoder is ``t5`` with the model's checkpoint, ``mask: true`` and ``max_tokens: 120`` (alpha) or 300 (Sigma).
    """

    target: ClassVar[str] = "longalign.backbones.pixart.backbone:PixArtBackbone"
    has_pooled: ClassVar[bool | None] = False

    name: Literal["pixart"] = "pixart"
    checkpoint: str
    """Hub id, e.g. ``PixArt-alpha/PixArt-XL-2-512x512``, or local folder in diffusers layout."""

    def resolution(self) -> int:
        """Native width and height of an image in pixels, read from the checkpoint's configs without its weights."""
        from longalign.backbones.stable_diffusion.layout import native_resolution

        place = {"layout": None, "subfolder": self.subfolder, "revision": self.revision}
        return native_resolution(self.checkpoint, self.component, **place)

    @property
    def divisor(self) -> int | None:
        patch, factor = self.number_of("patch_size"), super().divisor
        return factor * patch if factor is not None and patch is not None else None

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("caption_channels"), None
