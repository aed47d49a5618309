"""Data whose images are read as the autoencoder's posteriors, which were computed before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longalign.data.base import Data, check_index
from longalign.store import ADVICE as REMOVE
from longalign.store import Store
from longalign.weights import load_tensors, reading, save_tensors

ITEMS = "items.safetensors"
#: the key of an image that could not be read
UNREADABLE = bytes(16)
ADVICE = "run `longalign cache` again with this config"
CHECKED = 32


class CachedImages(Data):
    """Items ``{"prompt": str, "posterior": (2c, h, w)}`` of data whose images were encoded before.

    Args:
        data: the data itself, which still gives prompts and tells whether an image has changed.
        store: the posteriors, by the key of the image's content.
        keys: key of each item's image; `UNREADABLE` for one that another item takes the place of.
        stamps: ``(n,)`` what `Data.image_stamp` was.

    Raises:
        ValueError: if the data has another length, or some of its images are not what was encoded.
    """

    def __init__(self, data: Data, store: Store, keys: list[bytes], stamps: Tensor):
        if len(data) != len(keys):
            raise ValueError(f"the data has {len(data)} items and the cache {store.folder} {len(keys)}; {ADVICE}")
        self.data, self.store, self.keys, self.stamps = data, store, keys, stamps
        for index in sorted({i * (len(keys) - 1) // max(CHECKED - 1, 1) for i in range(CHECKED)}):
            if keys[index] != UNREADABLE:
                self._check(index, bool(self.stamps[index] != 0))

    @classmethod
    def load(cls, data: Data, store: Store) -> CachedImages:
        """Reads which image each item has. Raises ValueError if that is missing."""
        return cls(data, store, *read_items(store.folder))

    def __len__(self) -> int:
        return len(self.keys)

    def prompt(self, index: int) -> str:
        return self.data.prompt(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = check_index(index, len(self))
        for step in range(len(self)):
            at = (start + step) % len(self)
            if self.keys[at] != UNREADABLE:
                self._check(at)
                return {"prompt": self.data.prompt(at), "posterior": self.store[self.keys[at]]["posterior"]}
        raise ValueError(f"none of the {len(self)} images could be read when {self.store.folder} was made")

    def _check(self, index: int, trusting: bool = True) -> None:
        try:
            same = trusting and self.data.image_stamp(index) == int(self.stamps[index])
            same = same or self.data.image_key(index) == self.keys[index]
        except OSError as error:
            raise ValueError(f"the image of item {index} can no longer be read ({error}); {ADVICE}") from error
        if not same:
            raise ValueError(f"the image of item {index} is not the one that is in {self.store.folder}; {ADVICE}")


def read_items(folder: Path) -> tuple[list[bytes], Tensor]:
    """Key of each item's image and its stamp, as `CachedImages` takes them. Raises ValueError if they are missing."""
    if not (folder / ITEMS).is_file():
        raise ValueError(f"the cache {folder} is not complete; {ADVICE}")
    with reading(folder / ITEMS, REMOVE):
        found = load_tensors(folder / ITEMS)
        return [row.numpy().tobytes() for row in found["keys"]], found["stamps"]


def write_items(folder: Path, keys: list[bytes], stamps: list[int]) -> None:
    """Writes what `read_items` reads."""
    raw = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
    save_tensors(folder / ITEMS, {"keys": raw, "stamps": torch.tensor(stamps, dtype=torch.int64)})
