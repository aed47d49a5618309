"""Base class of indexed image data, which replaces unreadable images."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from longalign.caching.store import key_of
from longalign.data.base import Data, check_index
from longalign.image_io import check_regular, decode, to_tensor

log = logging.getLogger(__name__)

# errors of `decode` for unreadable images
UNREADABLE = (OSError, ValueError)


class Unreadable(dict[Hashable, str]):
    """Names of the images that could not be read so far, with the errors.

    Args:
        limit: number of unreadable images to tolerate.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def note(self, name: Hashable, error: BaseException) -> None:
        """Records and logs an unreadable image. Raises ValueError listing all of them if ``limit`` is exceeded."""
        if name in self:
            return
        self[name] = f"{type(error).__name__}: {error}"
        if len(self) > self.limit:
            raise ValueError(
                f"{len(self)} images cannot be read, more than max_unreadable={self.limit}: {self.summary()}. Repair "
                "or remove them, or raise max_unreadable"
            ) from error
        log.warning("%s cannot be read and is replaced by the next image (%s)", name, self[name])

    def summary(self) -> str:
        """Returns all names and errors in one line."""
        return "; ".join(f"{name} ({error})" for name, error in self.items())


class SquareLoader:
    """Loads images as squares of one size and warns of the 1st, 10th, 100th... image that is scaled up.

    Args:
        resolution: side in pixels.

    Raises:
        ValueError: if ``resolution`` is None.
    """

    def __init__(self, resolution: int | None):
        if resolution is None:
            raise ValueError(
                "resolution null means the backbone's resolution, but no backbone is set; set resolution in pixels"
            )
        self.resolution, self.small = resolution, 0

    def load(self, name: Hashable, source: Path | bytes) -> Tensor:
        """Loads an image as ``(3, resolution, resolution)`` in [0, 1], rotated by its EXIF, centre-cropped, resized.

        ``name`` identifies the image in messages. Raises OSError or ValueError if the image cannot be read.
        """
        image = decode(source)
        if min(image.size) < self.resolution:
            self.small += 1
            if set(str(self.small)[1:]) <= {"0"} and str(self.small)[0] == "1":
                log.warning(
                    "%d of the images read so far are smaller than resolution=%d and are scaled up, most recently %s "
                    "with %d by %d pixels",
                    self.small, self.resolution, name, *image.size,
                )  # fmt: skip
        return to_tensor(ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS))


class ImageDataset(Data):
    """Base class of indexed data with images from files or encoded bytes.

    Args:
        resolution: image side in pixels.
        max_unreadable: number of unreadable images to replace by the next readable one; one more raises an error.
    """

    def __init__(self, *, resolution: int | None, max_unreadable: int):
        self.loader = SquareLoader(resolution)
        #: unreadable images so far, with their errors
        self.unreadable = Unreadable(max_unreadable)

    def source(self, index: int) -> Path | bytes:
        """Returns the path or encoded bytes of the image of item ``index`` (non-negative)."""
        raise NotImplementedError

    def label(self, index: int) -> Hashable:
        """Returns the name of the image of item ``index`` (non-negative), for messages."""
        return self.source(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = check_index(index, len(self))
        for offset in range(len(self)):
            item = self.load_item((start + offset) % len(self))
            if item is not None:
                return item
        raise ValueError(
            f"none of the {len(self)} images can be read: {self.unreadable.summary()}. Repair or replace the files"
        )

    def load_item(self, index: int) -> dict[str, Any] | None:
        label = self.label(index)
        if label in self.unreadable:
            return None
        try:
            return {"prompt": self.prompt(index), "image": self.loader.load(label, self.source(index))}
        except UNREADABLE as error:
            self.unreadable.note(label, error)
            return None

    def image_key(self, index: int) -> bytes:
        source = self.source(index)
        if isinstance(source, bytes):
            return key_of(source)
        check_regular(source)
        return key_of(source.read_bytes())

    def image_stamp(self, index: int) -> int:
        source = self.source(index)
        if isinstance(source, bytes):
            key = key_of(source)
        else:
            status = source.stat()
            key = key_of(f"{status.st_size} {status.st_mtime_ns}")
        return int.from_bytes(key[:7], "big") + 1
