"""Encodes images for a page: as large and as good as a budget of bytes allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from longalign.image_io import load_image, to_pil

LADDER = ((1024, 85), (768, 80), (512, 75), (384, 70), (256, 65), (160, 60))
"""Longest side in pixels and WebP quality, from the largest files to the smallest."""
LOSSLESS_SIDE = 128
"""Pixels; images up to this size are stored without loss, since chroma subsampling would blur them."""
SAMPLE = 8
"""Images that estimate the size of all images."""


def encode(image: Tensor | Path, side: int, quality: int) -> bytes:
    """Returns an image as WebP.

    Args:
        image: a tensor ``(3, h, w)`` in [0, 1], or a file.
        side: longest side in pixels; larger images are downscaled.
        quality: 0 to 100.
    """
    pil_image = to_pil(image if isinstance(image, Tensor) else load_image(image))
    lossless = max(pil_image.size) <= min(LOSSLESS_SIDE, side)
    pil_image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pil_image.save(buffer, "WEBP", lossless=lossless, quality=quality, method=4)
    return buffer.getvalue()


def encode_all(images: Sequence[Tensor | Path], budget: int) -> list[str]:
    """Returns images as ``data:`` URLs of WebP files that together have at most ``budget`` bytes.

    The size and quality are the best of `LADDER` that fit, by an estimate from a sample. Images at the end that
    still exceed the budget are omitted.
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
