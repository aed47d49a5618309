"""Caches the latents of a run: the autoencoder's posteriors (mean and standard deviation) of the images."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from longalign.caching.processes import gather_rows, wait, writer_options
from longalign.config.run import RunConfig
from longalign.data.base import Data
from longalign.data.cached import ITEMS, UNREADABLE, read_items, write_items, write_posterior
from longalign.files.fingerprint import fingerprints
from longalign.files.store import Store
from longalign.runtime import Runtime

IMAGE_FOLDERS = ("vae",)


def has_latents(config: RunConfig) -> bool:
    """Whether a run caches latents: the value of ``cache.latents``; if it is null, whether the data has images.

    False for a config without ``cache`` or ``data``.
    """
    if config.cache is None or config.data is None:
        return False
    return config.data.has_images if config.cache.latents is None else config.cache.latents


def latent_store(config: RunConfig, runtime: Runtime, **options: Any) -> Store:
    """Opens and returns the store of a run's latents.

    The store's ``identity`` (see `longalign.files.store.Store`) contains the settings that determine the latents.
    ``options`` are further keyword arguments of `Store`, e.g. ``writable``.

    Raises:
        StaleCache: if the store was made with different settings.
        FileNotFoundError: if there is no store, and ``writable`` is not True.
        ValueError: if a file of the store is damaged.
    """
    assert config.cache is not None and config.data is not None and config.backbone is not None
    # The key `dtype` applies to the denoiser only, not to the autoencoder.
    backbone = config.backbone.model_dump(mode="json", exclude={"dtype"})
    identity = {
        "backbone": backbone,
        "data": config.data.for_backbone(config.backbone).model_dump(mode="json"),
        "dtype": runtime.dtype,
        "weights": fingerprints(backbone, IMAGE_FOLDERS),
    }
    return Store(Path(config.cache.folder) / "latents", identity, **options)


def make_latents(
    config: RunConfig, data: Data, runtime: Runtime, batch_size: int, shard_bytes: int, progress: bool
) -> tuple[int, int]:
    """Encodes, with the run's autoencoder, the images of ``data`` that are not cached yet, split over all processes.

    Args:
        config: the run's config.
        data: the data whose images are encoded.
        runtime: device, dtype and processes.
        batch_size: number of images per call of the autoencoder.
        shard_bytes: number of bytes of new entries after which a process writes a file.
        progress: whether to show a progress bar.

    Returns:
        The number of all entries of the cache and the number of new ones, over all processes.

    Raises:
        StaleCache: if the cache was made with different settings.
        ValueError: if items of the data change between reads, or no image can be read.
    """
    store = latent_store(config, runtime, **writer_options(runtime, shard_bytes))
    wait(runtime)  # every process must have opened the store before any new shard is written
    _check_deterministic(data)
    old_keys, old_stamps = [], torch.zeros(0, dtype=torch.int64)
    if (store.folder / ITEMS).is_file():
        old_keys, old_stamps, _ = read_items(store.folder)
    num_before, stored = len(store), set(store)
    items = range(runtime.rank, len(data), runtime.world_size)
    rows = _Rows(data, items, stored, old_keys, old_stamps.tolist())
    loader = DataLoader(rows, batch_size=None, num_workers=config.loop.workers)
    keys, stamps, buckets = [], [], []
    pending: dict[int, dict[bytes, Tensor]] = defaultdict(dict)  # images by bucket and key
    backbone: Any = None

    def encode(images: dict[bytes, Tensor]) -> None:
        nonlocal backbone
        assert config.backbone is not None
        if backbone is None:  # built only if an entry is missing
            backbone = config.backbone.build(runtime).eval()
        posteriors = backbone.posterior(torch.stack(list(images.values())))
        for key, posterior in zip(images, posteriors, strict=True):
            write_posterior(store, key, posterior)
        images.clear()

    for row in tqdm(loader, desc="latents", disable=not progress):
        keys.append(row["key"])
        stamps.append(row["stamp"])
        buckets.append(row["bucket"])
        images = pending[row["bucket"]]
        if row["image"] is not None and row["key"] not in store:
            images[row["key"]] = row["image"]
        if len(images) == batch_size:
            encode(images)
    for images in filter(None, pending.values()):
        encode(images)
    store.flush()
    # torch reads no empty buffer, as of a process without items
    raw = torch.frombuffer(bytearray(b"".join([*keys, UNREADABLE])), dtype=torch.uint8)
    key_rows = raw.view(-1, len(UNREADABLE))[:-1]
    keys = [row.numpy().tobytes() for row in gather_rows(key_rows, len(data), runtime)]
    numbers = torch.tensor([stamps, buckets], dtype=torch.int64).T
    stamps, buckets = gather_rows(numbers, len(data), runtime).T.tolist()
    if runtime.rank == 0:
        write_items(store.folder, keys, stamps, buckets)
    wait(runtime)
    if all(key == UNREADABLE for key in keys):
        raise ValueError(
            f"none of the {len(data)} images of the data can be read; check that the files exist and are images"
        )
    total = len(store.reopened())
    return total, total - num_before


class _Rows(Dataset[dict[str, Any]]):
    """Reads key, stamp, bucket and image of each item of this process.

    See `Data.image_key`, `Data.image_stamp` and `Data.bucket`. The image is None if the store already has its latent,
    or if the image cannot be read.

    Args:
        data: the data.
        items: indices of this process's items.
        stored: keys in the store.
        keys: keys of the items in the existing cache, to avoid reading unchanged images; empty without one.
        stamps: stamps of the items in the existing cache.
    """

    def __init__(self, data: Data, items: range, stored: set[bytes], keys: list[bytes], stamps: list[int]):
        self.data, self.items, self.stored, self.keys, self.stamps = data, items, stored, keys, stamps

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        index, key, stamp = self.items[row], UNREADABLE, 0
        try:
            stamp = self.data.image_stamp(index)
            unchanged = index < len(self.keys) and stamp != 0 and self.stamps[index] == stamp
            key = self.keys[index] if unchanged and self.keys[index] != UNREADABLE else self.data.image_key(index)
        except (OSError, ValueError):
            pass  # `load_item` below records the error
        image = None
        if key not in self.stored:
            item = self.data.load_item(index)
            key, image = (UNREADABLE, None) if item is None else (key, item["image"])
        # With several buckets, unreadable images are omitted; with one, the next image replaces them.
        omitted = key == UNREADABLE and len(self.data.buckets) > 1
        bucket = -1 if omitted else self.data.bucket(index)
        return {"key": key, "stamp": stamp, "bucket": bucket, "image": image}


def _check_deterministic(data: Data) -> None:
    """Raises ValueError if one of the first two items of the data differs between reads, e.g. a random flip."""
    for index in range(min(len(data), 2)):
        first, second = data.load_item(index), data.load_item(index)
        if first is None or second is None:
            continue
        if first["prompt"] != second["prompt"] or not torch.equal(first["image"], second["image"]):
            raise ValueError(
                f"item {index} of the data changes between reads (random crop, flip or caption), which a cache of "
                "latents would freeze; turn the randomness off, or set cache.latents to false"
            )
