"""Image sizes as text in configs and options, and buckets: sizes of about equal area and different aspect ratio.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field, PositiveInt

__all__ = ["ImageSize", "Size", "aspect_buckets", "nearest_bucket", "parse_size"]

_PATTERN = r"^[1-9][0-9]*[xX][1-9][0-9]*$"
#: an image size in a config: the side of a square in pixels, or ``WIDTHxHEIGHT`` in pixels
ImageSize = PositiveInt | Annotated[str, Field(pattern=_PATTERN)]


class Size(NamedTuple):
    """Height and width of an image in pixels. ``str()`` gives ``512`` for a square, otherwise ``WIDTHxHEIGHT``."""

    height: int
    width: int

    def __str__(self) -> str:
        return str(self.width) if self.width == self.height else f"{self.width}x{self.height}"


def parse_size(value: int | str) -> Size:
    """Returns the size of an image from the value of a config key or command-line option.

    Args:
        value: number of pixels, text ``N``, or text ``WxH`` (width first), e.g. ``"768x512"``.

    Raises:
        ValueError: if the value has a different form, or a side is zero or negative.
    """
    width, _, height = str(value).lower().partition("x")
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?", str(value).lower()):
        raise ValueError(f"expected a size in pixels as N or WxH, e.g. 512 or 768x512, got '{value}'")
    return Size(int(height or width), int(width))


def aspect_buckets(resolution: int, multiple_of: int, max_aspect_ratio: float) -> tuple[Size, ...]:
    """Returns image sizes of about equal area for training on different aspect ratios, from the widest to the tallest.

    Each size has an area of at most ``resolution`` squared. For each length of the short side, the long side is as long
    as possible. Stable Diffusion XL was trained on sizes chosen in this way (arXiv 2307.01952, section 2.3).

    Args:
        resolution: side of the square bucket in pixels.
        multiple_of: all sides are multiples of this number of pixels.
        max_aspect_ratio: maximum ratio of the long to the short side.

    Raises:
        ValueError: if ``resolution`` is not a multiple of ``multiple_of``.
    """
    if resolution % multiple_of:
        raise ValueError(
            f"the resolution {resolution} is not a multiple of multiple_of {multiple_of}; change one of them"
        )
    sizes = set()
    for short in range(multiple_of, resolution + 1, multiple_of):
        long = resolution**2 // (short * multiple_of) * multiple_of
        if long <= max_aspect_ratio * short:
            sizes |= {Size(short, long), Size(long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Returns the index of the size in ``buckets`` whose aspect ratio has the logarithm nearest to that of ``size``."""
    target = math.log(size.height / size.width)
    distances = [abs(math.log(bucket.height / bucket.width) - target) for bucket in buckets]
    return distances.index(min(distances))
