"""Images on disk: PNG files that carry text, and image files as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """An image ``(3, h, w)`` in [0, 1] as a PIL image of 8 bits."""
    return Image.fromarray((image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def write_png(path: Path, image: Tensor, texts: dict[str, str] | None = None) -> None:
    """Writes an image ``(3, h, w)`` in [0, 1] with text metadata of any length and script."""
    info = PngInfo()
    for key, value in (texts or {}).items():
        info.add_itxt(key, value)
    to_pil(image).save(path, pnginfo=info)


def load_image(path: Path | str) -> Tensor:
    """Reads an image file as a float32 tensor ``(3, h, w)`` in [0, 1]; transparency is dropped."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
