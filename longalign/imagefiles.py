"""Images on disk: PNG files that carry text, and image files as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """An image ``(3, h, w)`` in [0, 1] as a PIL image of 8 bits."""
    return Image.fromarray((image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image in RGB as a float32 tensor ``(3, h, w)`` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_png(path: Path, image: Tensor, texts: dict[str, str] | None = None) -> None:
    """Writes an image ``(3, h, w)`` in [0, 1] with text metadata of any length and script."""
    info = PngInfo()
    for key, value in (texts or {}).items():
        info.add_itxt(key, value)
    to_pil(image).save(path, pnginfo=info)


def decode(source: Path | str | bytes) -> Image.Image:
    """An image file, or its bytes, as a PIL image in RGB, turned as its EXIF data say; transparency is dropped.

    Raises:
        OSError: if there is no such file, or it is cut short or of no known format.
        ValueError: if it is damaged in another way, or too large to be an image.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError:
        raise
    except Exception as error:  # on damaged files Pillow raises struct.error, TypeError, KeyError and many more
        raise ValueError(f"{type(error).__name__}: {error}") from error


def load_image(path: Path | str) -> Tensor:
    """Reads an image file as a float32 tensor ``(3, h, w)`` in [0, 1]; see `decode`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read; the file is named.
    """
    try:
        return to_tensor(decode(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


class ImageFiles(Sequence[Tensor]):
    """Image files as images ``(3, h, w)`` in [0, 1] of any sizes, each read when it is asked for.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[Path | str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        """The image at an index, or those of a slice as `ImageFiles`."""
        return ImageFiles(self.paths[index]) if isinstance(index, slice) else load_image(self.paths[index])
