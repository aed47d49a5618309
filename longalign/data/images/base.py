"""Base class of image data that is read by index. Unreadable images are replaced by later ones."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from longalign.data.base import Data, check_index
from longalign.files.store import key_of
from longalign.image_io import check_regular, decode, read_size, to_tensor
from longalign.sizes import Size, nearest_bucket

log = logging.getLogger(__name__)

#: Side of square images in pixels, or a list of image sizes. `ImageLoader` rejects None, the value of a config
#: without a size.
Resolution = int | Sequence[Size] | None
# errors that `longalign.image_io.decode` raises for unreadable images
UNREADABLE = (OSError, ValueError)


class Unreadable(dict[Hashable, str]):
    """The images that could not be read so far, as name -> error.

    Args:
        limit: number of unreadable images that are tolerated, see `note`.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def note(self, name: Hashable, error: BaseException) -> None:
        """Adds an unreadable image and logs a warning, unless ``name`` was added before.

        Raises:
            ValueError: if more than ``limit`` images are unreadable; the message lists all of them.
        """
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
        """Returns all names and errors in one line: ``name (error); name (error)``."""
        return "; ".join(f"{name} ({error})" for name, error in self.items())


class ImageLoader:
    """Loads images, resized and cropped to one of several sizes, which are called buckets.

    Logs a warning at the 1st, 10th, 100th, ... image that is scaled up.

    Args:
        resolution: side of square images in pixels (one bucket), or the sizes of the buckets.

    Raises:
        ValueError: if ``resolution`` is None.
    """

    def __init__(self, resolution: Resolution):
        if resolution is None:
            raise ValueError(
                "resolution null means the backbone's resolution, but no backbone is set; set resolution in pixels"
            )
        self.sizes = [Size(resolution, resolution)] if isinstance(resolution, int) else list(resolution)
        self.small = 0

    def bucket(self, source: Path | bytes) -> int:
        """Returns the index of the bucket whose aspect ratio is nearest to that of an image.

        Reads only the header of the image; with one bucket, nothing is read.

        Args:
            source: path of the image file, or the bytes of such a file.

        Raises:
            OSError, ValueError: if the header cannot be read.
        """
        return nearest_bucket(read_size(source), self.sizes) if len(self.sizes) > 1 else 0

    def load(self, name: Hashable, source: Path | bytes, bucket: int = 0) -> Tensor:
        """Loads an image as float32 ``(3, h, w)`` in [0, 1], centre-cropped and resized to the size of a bucket.

        Before that, the image is rotated by its EXIF orientation.

        Args:
            name: name of the image in messages.
            source: path of the image file, or the bytes of such a file.
            bucket: index of the bucket.

        Raises:
            OSError, ValueError: if the image cannot be read.
        """
        image, size = decode(source), self.sizes[bucket]
        if image.height < size.height or image.width < size.width:
            self.small += 1
            if set(str(self.small)[1:]) <= {"0"} and str(self.small)[0] == "1":
                log.warning(
                    "%d of the images read so far are smaller than resolution=%s and are scaled up, most recently %s "
                    "with %d by %d pixels",
                    self.small, size, name, *image.size,
                )  # fmt: skip
        return to_tensor(ImageOps.fit(image, (size.width, size.height), Image.Resampling.LANCZOS))


class ImageDataset(Data):
    """Base class of data with one stored image per item, read by index.

    Subclasses implement ``__len__``, ``prompt`` and ``source``.

    Args:
        resolution: side of square images in pixels, or a list of image sizes; see `ImageLoader`.
        max_unreadable: number of unreadable images to replace by the next readable one; one more raises an error.
    """

    def __init__(self, *, resolution: Resolution, max_unreadable: int):
        self.loader = ImageLoader(resolution)
        #: unreadable images so far, with their errors
        self.unreadable = Unreadable(max_unreadable)

    def source(self, index: int) -> Path | bytes:
        """Returns the path of the image file of item ``index`` (non-negative), or the bytes of such a file."""
        raise NotImplementedError(f"{type(self).__name__} has no method source; implement it")

    def label(self, index: int) -> Hashable:
        """Returns the name of the image of item ``index`` (non-negative) for messages; by default its `source`."""
        return self.source(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = check_index(index, len(self))
        bucket = self.bucket(start)
        for offset in range(len(self)):
            # In the same size, so that the replacement fits into the batch.
            item = self.load_item((start + offset) % len(self), None if bucket < 0 else bucket)
            if item is not None:
                return item
        raise ValueError(
            f"none of the {len(self)} images can be read: {self.unreadable.summary()}. Repair or replace the files"
        )

    @property
    def buckets(self) -> Sequence[Size]:
        return self.loader.sizes

    def bucket(self, index: int) -> int:
        if len(self.buckets) == 1:
            return 0
        try:  # also if the pixels are known to be unreadable: the size of the replacement must not change
            return self.loader.bucket(self.source(index))
        except UNREADABLE as error:
            self.unreadable.note(self.label(index), error)
            return -1

    def load_item(self, index: int, bucket: int | None = None) -> dict[str, Any] | None:
        """Returns item ``index``, or None if its image cannot be read.

        Args:
            index: non-negative index of the item.
            bucket: index in `buckets` of the size of the returned image; None for the size with the aspect ratio
                nearest to that of the stored image.
        """
        label = self.label(index)
        bucket = self.bucket(index) if bucket is None else bucket
        if label in self.unreadable:
            return None
        try:
            return {"prompt": self.prompt(index), "image": self.loader.load(label, self.source(index), bucket)}
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
