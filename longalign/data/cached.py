"""Dataset whose items have a VAE posterior read from a cache instead of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longalign.data.base import Data, check_index, spread_indices
from longalign.files.store import REPAIR_ADVICE, Store
from longalign.files.weights import load_tensors, reading, save_tensors
from longalign.sizes import Size

ITEMS = "items.safetensors"
#: key of an image that could not be read
UNREADABLE = bytes(16)
RERUN_ADVICE = "run `longalign cache` again with this config"


class CachedImages(Data):
    """Prompts with cached VAE posteriors. An item is ``{"prompt": str, "posterior": (2c, h, w)}``.

    ``posterior`` is the mean and the standard deviation of the unscaled latent ``(c, h, w)`` of the image, see
    `longalign.backbones.Backbone.posterior`. An image is checked for changes when its item is read; up to 32 images are
    also checked at construction.

    Args:
        data: the uncached data of ``n`` items, with the prompts, and the images that are checked.
        store: the posteriors, by `Data.image_key`.
        keys: `Data.image_key` of each item. Items with `UNREADABLE` are replaced by the next readable item.
        stamps: ``(n,)`` int64, `Data.image_stamp` of each item when its image was encoded.
        numbers: ``(n,)`` int64, `Data.bucket` of each item.

    Raises:
        ValueError: if ``data`` and ``keys`` differ in length, or a checked image differs from the encoded one.
    """

    def __init__(self, data: Data, store: Store, keys: list[bytes], stamps: Tensor, numbers: Tensor):
        if len(data) != len(keys):
            raise ValueError(
                f"the data has {len(data)} items, but the cache {store.folder} has {len(keys)}; {RERUN_ADVICE}"
            )
        self.data, self.store, self.keys, self.stamps, self.numbers = data, store, keys, stamps, numbers
        for index in spread_indices(len(keys)):
            if keys[index] != UNREADABLE:
                self._check(index, bool(self.stamps[index] != 0))

    @classmethod
    def load(cls, data: Data, store: Store) -> CachedImages:
        """Builds the cached version of ``data``.

        Args:
            data: the uncached data.
            store: the posteriors. The folder of the store must have the item list that `write_items` wrote.

        Raises:
            ValueError: if the folder has no item list, or the data changed since the list was written.
        """
        return cls(data, store, *read_items(store.folder))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def buckets(self) -> Sequence[Size]:
        return self.data.buckets

    def bucket(self, index: int) -> int:
        return int(self.numbers[index])

    def prompt(self, index: int) -> str:
        return self.data.prompt(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = check_index(index, len(self))
        for offset in range(len(self)):
            i = (start + offset) % len(self)
            if self.keys[i] != UNREADABLE:
                self._check(i)
                return {"prompt": self.data.prompt(i), "posterior": read_posterior(self.store, self.keys[i])}
        raise ValueError(
            f"none of the {len(self)} images could be read when {self.store.folder} was built; repair or replace them, "
            f"then {RERUN_ADVICE}"
        )

    def _check(self, index: int, trust_stamp: bool = True) -> None:
        try:
            same = trust_stamp and self.data.image_stamp(index) == int(self.stamps[index])
            same = same or self.data.image_key(index) == self.keys[index]
        except OSError as error:
            raise ValueError(f"the image of item {index} can no longer be read ({error}); {RERUN_ADVICE}") from error
        if not same:
            raise ValueError(
                f"the image of item {index} differs from the one encoded in {self.store.folder}; {RERUN_ADVICE}"
            )


def write_posterior(store: Store, key: bytes, posterior: Tensor) -> None:
    """Adds a posterior ``(2c, h, w)`` to ``store`` under ``key``.

    The posterior is stored flat, with its shape beside it, since the tensors of one name in a store may differ only in
    the size of their first dimension.
    """
    store.add(key, {"posterior": posterior.flatten(), "shape": torch.tensor(posterior.shape)})


def read_posterior(store: Store, key: bytes) -> Tensor:
    """Returns the posterior ``(2c, h, w)`` that `write_posterior` added to ``store`` under ``key``."""
    entry = store[key]
    return entry["posterior"].view(entry["shape"].tolist())


def read_items(folder: Path) -> tuple[list[bytes], Tensor, Tensor]:
    """Reads the item list that `write_items` wrote into the folder of a cache.

    Returns:
        The key of each item's image, the stamps ``(n,)`` int64, and the buckets ``(n,)`` int64; see `CachedImages`.

    Raises:
        ValueError: if the folder has no item list.
    """
    if not (folder / ITEMS).is_file():
        raise ValueError(f"the cache {folder} is incomplete; {RERUN_ADVICE}")
    with reading(folder / ITEMS, REPAIR_ADVICE):
        tensors = load_tensors(folder / ITEMS)
        return [row.numpy().tobytes() for row in tensors["keys"]], tensors["stamps"], tensors["buckets"]


def write_items(folder: Path, keys: list[bytes], stamps: list[int], buckets: list[int]) -> None:
    """Writes the item list of a cache into its folder: key, stamp and bucket of each item, see `CachedImages`."""
    raw = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
    numbers = {"stamps": stamps, "buckets": buckets}
    save_tensors(folder / ITEMS, {"keys": raw, **{k: torch.tensor(v, dtype=torch.int64) for k, v in numbers.items()}})
