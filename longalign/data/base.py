"""Base class of data: a map-style dataset of prompts, usually with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from longalign.files.store import key_of
from longalign.sizes import Size


class Data(Dataset[dict[str, Any]]):
    """Base class of map-style data. Subclasses implement ``__len__`` and ``__getitem__``.

    An item is ``{"prompt": str, "image": float32 (3, h, w) in [0, 1]}``. Items of prompt-only data have no ``image``;
    items of preference data have two images in ``image``, see `longalign.data.Pairs`. Item i must be the same on every
    read: seed any randomness with the index, so that a resumed run sees the same data.
    """

    #: whether items have an image
    has_images: bool = True

    @property
    def buckets(self) -> Sequence[Size]:
        """The possible image sizes in pixels. Each size is one bucket, and all images of a batch are of one bucket.

        Data whose images all have the same size may return an empty sequence, the default.
        """
        return ()

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} has no __len__; implement it")

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} has no __getitem__; implement it")

    def prompt(self, index: int) -> str:
        """Returns the prompt of an item, without loading or rendering its image."""
        return self[index]["prompt"]

    def bucket(self, index: int) -> int:
        """Returns the index in `buckets` of an item's image size, without loading the image.

        -1 means that the image cannot be read. The default is 0, for data with one size.
        """
        return 0

    # Used by caches

    def load_item(self, index: int) -> dict[str, Any] | None:
        """Returns item ``index``, or None if its image cannot be read. In this case, ``data[index]`` is a later item.

        The default returns ``data[index]``, for data whose images can always be read.
        """
        return self[index]

    def image_key(self, index: int) -> bytes:
        """Returns a 16-byte hash of the bytes of an item's image file, or of the pixels if the image is in no file."""
        return key_of(self[index]["image"].contiguous().numpy().tobytes())

    def image_stamp(self, index: int) -> int:
        """Returns an integer that changes when an item's image may have changed.

        For an image file, this is a hash of its size and modification time; for an image in a table, a hash of its
        bytes. 0, the default, means that the config alone determines the image.
        """
        return 0


def spread_indices(count: int, number: int = 32) -> list[int]:
    """Returns up to ``number`` evenly spaced indices from 0 to ``count - 1``, both included, in ascending order.

    Caches check only the items with these indices for changes, since checking all items would be slow.
    """
    return sorted({i * (count - 1) // (number - 1) for i in range(number)}) if count else []


def check_index(index: int, length: int) -> int:
    """Returns ``index`` as a non-negative index; -1 is the last of ``length`` items.

    Raises:
        IndexError: if ``index`` is not from ``-length`` to ``length - 1``.
    """
    if not -length <= index < length:
        raise IndexError(f"item {index} is out of range for {length} items; expected {-length} to {length - 1}")
    return index % length
