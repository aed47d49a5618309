"""The base class of data configs; no torch here."""

from __future__ import annotations

from typing import ClassVar

from longalign.registry import PartConfig


class DataConfig(PartConfig):
    """Base class of data configs.

    ``has_images``: items have an image; otherwise only a prompt. ``has_pairs``: items have two images and a preference.
    """

    has_images: ClassVar[bool] = True
    has_pairs: ClassVar[bool] = False

    @property
    def image_size(self) -> int | None:
        """Side of the images in pixels; None if it varies, is unknown, or is the backbone's native resolution."""
        return None
