"""Images from files or encoded bytes as items, and what happens to those that cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from longalign.data.base import Data, check_index
from longalign.image_io import check_regular, decode, to_tensor
from longalign.store import key_of

log = logging.getLogger(__name__)

# what reading an image raises where the image is at fault, see `decode`
UNREADABLE = (OSError, ValueError)


class Unreadable(dict[Any, str]):
    """Images that could not be read so far, by name, with what was wrong.

    Args:
        limit: how many there may be.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def note(self, name: Any, error: BaseException) -> None:
        """Counts and names one; raises ValueError, with all of them, if that is one too many."""
        if name in self:
            return
        self[name] = f"{type(error).__name__}: {error}"
        if len(self) > self.limit:
            raise ValueError(
                f"{len(self)} images cannot be read, more than max_unreadable={self.limit}: {self.named()}"
            ) from error
        log.warning("%s cannot be read and is replaced by the next image (%s)", name, self[name])

    def named(self) -> str:
        """All of them in one line."""
        return "; ".join(f"{name} ({what})" for name, what in self.items())


class Squares:
    """Loads images as squares of one size, and says in a warning how many were smaller: the 1st, 10th, 100th...

    Args:
        resolution: side in pixels.

    Raises:
        ValueError: if it is None.
    """

    def __init__(self, resolution: int | None):
        if resolution is None:
            raise ValueError("resolution null is the backbone's own and needs a run with one; give a number of pixels")
        self.resolution, self.small = resolution, 0

    def load(self, name: Any, source: Path | bytes) -> Tensor:
        """The image as `load_square` gives it; ``name`` is what it is called in messages."""
        image = decode(source)
        if min(image.size) < self.resolution:
            self.small += 1
            if set(str(self.small)[1:]) <= {"0"} and str(self.small)[0] == "1":
                log.warning(
                    "%d of the images read so far are smaller than resolution=%d and are scaled up; the last is %s of "
                    "%d by %d pixels",
                    self.small, self.resolution, name, *image.size,
                )  # fmt: skip
        return _square(image, self.resolution)


class ImageDataset(Data):
    """Base of data whose items are read by index, each with its image in a file or in bytes.

    Args:
        resolution: side of the images in pixels.
        max_unreadable: how many unreadable images are replaced by the next readable one before the run is stopped.
    """

    def __init__(self, resolution: int | None = 512, max_unreadable: int = 10):
        self.squares = Squares(resolution)
        #: unreadable images met so far, with what was wrong
        self.unreadable = Unreadable(max_unreadable)

    def source(self, index: int) -> Path | bytes:
        """Where the image of item ``index`` (not negative) is."""
        raise NotImplementedError

    def label(self, index: int) -> Any:
        """What the image of item ``index`` (not negative) is called in messages."""
        return self.source(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = check_index(index, len(self))
        for step in range(len(self)):
            item = self.load_item((start + step) % len(self))
            if item is not None:
                return item
        raise ValueError(f"none of the {len(self)} images can be read: {self.unreadable.named()}")

    def load_item(self, index: int) -> dict[str, Any] | None:
        label = self.label(index)
        if label in self.unreadable:
            return None
        try:
            return {"prompt": self.prompt(index), "image": self.squares.load(label, self.source(index))}
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
            state = source.stat()
            key = key_of(f"{state.st_size} {state.st_mtime_ns}")
        return int.from_bytes(key[:7], "big") + 1


def load_square(source: Path | bytes, resolution: int) -> Tensor:
    """The largest square in the middle of an image, upright and scaled: ``(3, resolution, resolution)`` in [0, 1].

    Raises OSError or ValueError if it cannot be read.
    """
    return _square(decode(source), resolution)


def _square(image: Image.Image, resolution: int) -> Tensor:
    return to_tensor(ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS))
