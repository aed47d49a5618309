"""The base class of backbone configs; no torch here."""

from __future__ import annotations

from typing import ClassVar

from longalign.registry import PartConfig


class BackboneConfig(PartConfig):
    """Base class of backbone configs."""

    #: whether the denoiser takes a pooled embedding of the prompt; None if unknown
    has_pooled: ClassVar[bool | None] = None

    @property
    def divisor(self) -> int | None:
        """Divisor of an image's height and width in pixels; None if unknown."""
        return None

    def resolution(self) -> int | None:
        """Native width and height of an image in pixels; None if unknown. It does not load weights."""
        return None

    def widths(self) -> tuple[int | None, int | None]:
        """Widths of the states and of the pooled embedding that the denoiser takes; None if unknown."""
        return None, None
