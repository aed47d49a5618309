"""Encodes images for an HTML page, as large and in as good a quality as a number of bytes allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from longalign.image_io import load_image, to_pil

LADDER = ((1024, 85), (768, 80), (512, 75), (384, 70), (256, 65), (160, 60))
"""Longest side in pixels and WebP quality (0 to 100), from the largest files to the smallest."""
LOSSLESS_SIDE = 128
"""Images whose longest side has up to this many pixels are stored without loss, since chroma subsampling would blur
them."""
SAMPLE = 8
"""Approximate number of images whose encoded bytes estimate those of all images."""


def encode(image: Tensor | Path, side: int, quality: int) -> bytes:
    """Returns the bytes of a WebP file of an image.

    Args:
        image: a tensor ``(3, h, w)`` in [0, 1], or the path of an image file.
        side: longest side in pixels; larger images are downscaled.
        quality: WebP quality from 0 to 100; ignored for small images, see `LOSSLESS_SIDE`.
    """
    pil_image = to_pil(image if isinstance(image, Tensor) else load_image(image))
    lossless = max(pil_image.size) <= min(LOSSLESS_SIDE, side)
    pil_image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pil_image.save(buffer, "WEBP", lossless=lossless, quality=quality, method=4)
    return buffer.getvalue()


def encode_all(images: Sequence[Tensor | Path], budget: int) -> list[str]:
    """Returns images as ``data:`` URLs of WebP files that together have at most ``budget`` bytes before base64.

    All images are encoded with the first size and quality of `LADDER` whose files fit the budget, as estimated from
    some of the images. If the files of all images exceed the budget nevertheless, images at the end are omitted; the
    result is then shorter than ``images``.

    Args:
        images: tensors ``(3, h, w)`` in [0, 1], or paths of image files.
        budget: maximum number of bytes of all WebP files together.
    """
    sample = images[:: max(1, len(images) // SAMPLE)]
    side, quality = LADDER[-1]
    for side, quality in LADDER:
        total = sum(len(encode(image, side, quality)) for image in sample) * len(images) / max(1, len(sample))
        if total <= 0.9 * budget:
            break
    urls, used = [], 0
    for image in images:
        data = encode(image, side, quality)
        used += len(data)
        if used > budget:
            break
        urls.append("data:image/webp;base64," + base64.b64encode(data).decode())
    return urls
