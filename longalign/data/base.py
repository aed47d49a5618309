"""Base class of data: a map-style dataset of prompts, usually with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from longalign.caching.store import key_of
from longalign.sizes import Size


class Data(Dataset[dict[str, Any]]):
    """Base class of map-style data.

    An item is ``{"prompt": str, "image": FloatTensor (3, h, w) in [0, 1]}``; prompt-only data has no ``image``. Item i
    must be the same on every read: seed any randomness with the index, so that a resumed run sees the same data.
    """

    #: whether items have an image
    has_images: bool = True

    @property
    def buckets(self) -> Sequence[Size]:
        """Sizes of the images. If there are several, a batch has items of one `bucket`; otherwise it may be empty."""
        return ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def prompt(self, index: int) -> str:
        """Returns the prompt of an item, without loading or rendering its image."""
        return self[index]["prompt"]

    def bucket(self, index: int) -> int:
        """Returns the position of an item's size in `buckets`, without loading the image; -1 if it cannot be read."""
        return 0

    # Used by caches

    def load_item(self, index: int) -> dict[str, Any] | None:
        """Returns item ``index``, or None if it cannot be read and is replaced by the next item."""
        return self[index]

    def image_key(self, index: int) -> bytes:
        """Returns the 16-byte hash of the content that an item's image is made from."""
        return key_of(self[index]["image"].contiguous().numpy().tobytes())

    def image_stamp(self, index: int) -> int:
        """Returns a number that changes when the image may have changed, e.g. a hash of its file's size and mtime.

        0 means that the config alone determines the image.
        """
        return 0


def spread_indices(count: int, number: int = 32) -> list[int]:
    """Returns up to ``number`` evenly spread indices of ``count`` items in ascending order, with the first and last.

    Changes of data are detected by a check of these items.
    """
    return sorted({i * (count - 1) // (number - 1) for i in range(number)}) if count else []


def check_index(index: int, length: int) -> int:
    """Returns ``index`` as a non-negative index. Raises `IndexError` if it is out of range."""
    if not -length <= index < length:
        raise IndexError(f"item {index} is out of range for {length} items")
    return index % length
