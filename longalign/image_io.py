"""Reads image files as tensors, and writes PNG files with text metadata."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from longalign.sizes import Size


def to_pil(image: Tensor) -> Image.Image:
    """Converts an RGB image ``(3, h, w)`` in [0, 1] to an 8-bit PIL image. Values outside the range are clamped."""
    return Image.fromarray((image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an 8-bit RGB PIL image to a float32 tensor ``(3, h, w)`` in [0, 1] on the CPU."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_png(path: Path, image: Tensor, texts: dict[str, str] | None = None) -> None:
    """Writes an RGB image ``(3, h, w)`` in [0, 1] as 8-bit PNG, with ``texts`` (keyword -> text) as metadata."""
    info = PngInfo()
    for key, value in (texts or {}).items():
        info.add_itxt(key, value)
    to_pil(image).save(path, pnginfo=info)


@contextmanager
def _opened(source: Path | str | bytes) -> Iterator[Image.Image]:
    """Context manager: opens an image file, or its bytes, in one of `FORMATS`. Raises the errors of `decode`."""
    if not isinstance(source, bytes):
        check_regular(source)
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(
                    f"{image.width} by {image.height} pixels exceed the limit of {limit}; scale the image down, or "
                    "raise PIL.Image.MAX_IMAGE_PIXELS"
                )
            yield image
    except (OSError, ValueError):
        raise
    except Exception as error:  # on damaged files Pillow raises struct.error, TypeError, KeyError and many more
        raise ValueError(f"the file is damaged ({type(error).__name__}: {error}); replace it") from error


def read_size(source: Path | str | bytes) -> Size:
    """Returns height and width in pixels of the image that `decode` would return, from the header of the file.

    Raises the errors of `decode`, except for damaged or out-of-range pixels, which are not read.
    """
    with _opened(source) as image:
        # Pillow would decode all pixels to look for EXIF data at the end of a PNG
        has_exif = image.format != "PNG" or "exif" in image.info
        rotated = has_exif and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return Size(image.width, image.height) if rotated else Size(image.height, image.width)


def decode(source: Path | str | bytes) -> Image.Image:
    """Decodes an image file, or its bytes, to an 8-bit RGB PIL image.

    The image is rotated as its EXIF data specifies. An alpha channel is dropped, 16-bit grey levels and floats in
    [0, 1] are scaled to 8 bits, and of several images in a file, the first is used. Only `FORMATS` are accepted,
    because formats such as PostScript would make Pillow start an external program.

    Raises:
        OSError: if the file does not exist, is truncated or has an unsupported format.
        ValueError: if the file is otherwise damaged, not a regular file (a pipe, device or folder), has more pixels
            than ``PIL.Image.MAX_IMAGE_PIXELS``, or holds 32-bit integers or floats outside [0, 1].
    """
    with _opened(source) as image:
        return _eight_bits(ImageOps.exif_transpose(image), image.format).convert("RGB")


#: accepted image formats, if the installed Pillow supports them
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "MPO")


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_regular(path: Path | str) -> None:
    """Raises FileNotFoundError if a path does not exist, and ValueError if it is a folder, pipe, device or socket.

    Called before a file is opened, because reading a pipe can block forever.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise ValueError(f"expected a regular file, got {kind}; give an image file")


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Converts an image with 16-bit grey levels or floats in [0, 1] to 8 bits; other images are returned unchanged.

    Pillow itself would clip 16-bit values to white. ``kind`` is Pillow's name of the file format.

    Raises:
        ValueError: for 32-bit integers, and for floats outside [0, 1].
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64) / 65535
    elif image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            values_range = f"{values.min():.4g} to {values.max():.4g}"
            raise ValueError(
                f"expected float pixel values from 0 to 1, got {values_range}; rescale the image, or save it with 8 "
                "or 16 bits per channel"
            )
    elif image.mode == "I":
        raise ValueError("32-bit integer pixels have no known range; save the image with 8 or 16 bits per channel")
    else:
        return image
    return Image.fromarray((values * 255).round().astype(np.uint8))


def load_image(path: Path | str) -> Tensor:
    """Reads an image file with `decode` as an RGB float32 tensor ``(3, h, w)`` in [0, 1] on the CPU.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read; the message contains the path.
    """
    try:
        return to_tensor(decode(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image; replace or convert it: {error}") from error


class ImageFiles(Sequence[Tensor]):
    """Sequence of image files as tensors. Each access reads a file with `load_image`: ``(3, h, w)`` in [0, 1].

    Args:
        paths: the files. The images may have different sizes.
    """

    def __init__(self, paths: Sequence[Path | str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...

    def __getitem__(self, index: int | slice) -> Tensor | ImageFiles:
        """Returns the image at an index, or `ImageFiles` for a slice."""
        return ImageFiles(self.paths[index]) if isinstance(index, slice) else load_image(self.paths[index])
