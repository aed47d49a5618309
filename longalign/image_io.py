"""Images on disk: PNG files that carry text, and image files as tensors."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from functools import cache
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

    16 bits a channel are scaled to 8. Of several pictures in a file it is the first. Formats are those of `FORMATS`, so
    that no file is handed to another program, as PostScript would be.

    Raises:
        OSError: if there is no such file, or it is truncated or of no known format.
        ValueError: if it is damaged in another way, no regular file (a pipe, a device, a folder), has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or values whose range is not known.
    """
    if not isinstance(source, bytes):
        check_regular(source)
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(
                    f"{image.width} by {image.height} pixels are more than the limit of {limit}; scale it down, or "
                    "raise PIL.Image.MAX_IMAGE_PIXELS"
                )
            return _eight_bits(ImageOps.exif_transpose(image), image.format).convert("RGB")
    except (OSError, ValueError):
        raise
    except Exception as error:  # on damaged files Pillow raises struct.error, TypeError, KeyError and many more
        raise ValueError(f"{type(error).__name__}: {error}") from error


#: what images are read from, as far as the installed Pillow can
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "MPO")


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_regular(path: Path | str) -> None:
    """Raises ValueError unless a path is a regular file, or FileNotFoundError: a pipe would be waited for, for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise ValueError(f"it is {what}, not a regular file")


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Grey images of 16 bits, which Pillow would clip to white, and floats in [0, 1] as 8 bits; others as they are.

    Raises:
        ValueError: for integers of 32 bits, and floats outside of [0, 1].
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64) / 65535
    elif image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            found = f"{values.min():.4g} to {values.max():.4g}"
            raise ValueError(f"its values are floats from {found}; expected 0 to 1, or a file of 8 or 16 bits")
    elif image.mode == "I":
        raise ValueError("its values are integers of 32 bits, whose range is not known; save it with 8 or 16 bits")
    else:
        return image
    return Image.fromarray((values * 255).round().astype(np.uint8))


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
