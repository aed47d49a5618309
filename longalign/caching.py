"""Caches of a run: latents and the frozen states of prompts, computed once and refused when they are stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from longalign.config import RunConfig
from longalign.data.base import Data, sized
from longalign.data.cached import ITEMS, UNREADABLE, CachedImages, read_items, write_items
from longalign.data.lines import read_prompts
from longalign.data.stream import Stream
from longalign.encoders.base import Encoder
from longalign.encoders.cached import (
    build_cached,
    entries,
    frozen_config,
    leaves,
    prompt_key,
    require_cached,
    settings,
)
from longalign.fingerprint import fingerprints
from longalign.locks import Lock
from longalign.registry import PartConfig
from longalign.runtime import Runtime
from longalign.store import SHARD_BYTES, Store

TEXT_FOLDERS = ("text_encoder", "tokenizer")
IMAGE_FOLDERS = ("vae",)
CHECKED = 32


def make(
    config: RunConfig,
    runtime: Runtime,
    batch_size: int = 16,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> dict[str, tuple[int, int]]:
    """Computes what a run's caches lack. What is on disk already is kept, so an interrupted call can be repeated.

    Several processes (``runtime.world_size``) share images and prompts; each writes its own shards, and together they
    make what one would. An image that is there twice may be encoded by two of them; one of the results is read.

    Args:
        config: a run with ``cache``.
        runtime: where encoders are built, and by which processes; training must have the same dtype.
        batch_size: images, or prompts, encoded at a time.
        shard_bytes: size of a file; a call that is interrupted loses the last, incomplete one.
        progress: whether to show bars.

    Returns:
        For each part of the cache how many entries it has, and how many of them are new: of all processes.

    Raises:
        StaleCache: if there is a cache made with other settings.
        ValueError: if another process is making the cache, there is no ``cache`` or no ``data`` in the config, the data
            is a stream or draws its items anew, or an encoder cannot be cached.
    """
    if config.cache is None or config.data is None:
        raise ValueError("expected a config with 'data' and 'cache', e.g. cache: {folder: runs/cache}")
    data = by_index(sized(config).build(runtime), config)
    progress = progress and runtime.rank == 0
    lock = Lock(Path(config.cache.folder)) if runtime.rank == 0 else None
    try:
        return _make(config, data, runtime, batch_size, shard_bytes, progress)
    finally:
        if lock is not None:
            lock.release()


def _make(
    config: RunConfig, data: Data, runtime: Runtime, batch_size: int, shard_bytes: int, progress: bool
) -> dict[str, tuple[int, int]]:
    assert config.cache is not None
    made = {}
    if _has_latents(config):
        made["latents"] = _make_latents(config, data, runtime, batch_size, shard_bytes, progress)
    if config.cache.prompts:
        prompts = list(dict.fromkeys(["", *_validation_prompts(config), *(data.prompt(i) for i in range(len(data)))]))
        for name, leaf in _named(config):
            made[name] = _make_prompts(config, name, leaf, prompts, runtime, batch_size, shard_bytes, progress)
    return made


def check(config: RunConfig, runtime: Runtime) -> None:
    """Refuses caches that are missing or stale, before anything heavy is loaded.

    Raises:
        StaleCache: naming what differs.
        FileNotFoundError: if there is none.
    """
    if _has_latents(config):
        _latents(config, runtime)
    if config.cache is not None and config.cache.prompts:
        for name, leaf in _named(config):
            _prompts(config, name, leaf, runtime)


def by_index(data: Data | Stream, config: RunConfig) -> Data:
    """The data, if it has items by index. Raises ValueError for a stream."""
    if isinstance(data, Stream):
        raise ValueError(
            f"the data '{config.data and config.data.name}' is read as a stream, whose items have no number to be kept "
            "under; choose data that is read by index (folder, hf without streaming), or leave out cache"
        )
    return data


def cached_data(config: RunConfig, data: Data, runtime: Runtime) -> Data:
    """The data with latents for images, if the run caches them."""
    return CachedImages.load(data, _latents(config, runtime)) if _has_latents(config) else data


def cached_encoder(config: RunConfig, data: Data, runtime: Runtime) -> Encoder:
    """The encoder without its text models, which need not be loaded.

    Raises:
        ValueError: if prompts of the data, of which some are looked for, or of the validation are not in the cache.
    """
    stores = [_prompts(config, name, leaf, runtime) for name, leaf in _named(config)]
    last = len(data) - 1
    some = [data.prompt(i) for i in sorted({i * last // (CHECKED - 1) for i in range(CHECKED)})]
    for prompt in ["", *_validation_prompts(config), *some]:
        for store in stores:
            require_cached(store, prompt)
    remaining = iter(stores)
    assert config.encoder is not None
    return build_cached(config.encoder, lambda leaf: next(remaining), runtime)


def _has_latents(config: RunConfig) -> bool:
    if config.cache is None or config.data is None:
        return False
    has_images = getattr(config.data, "has_images", True)
    return has_images if config.cache.latents is None else config.cache.latents


def _validation_prompts(config: RunConfig) -> list[str]:
    if config.validation is None:
        return []
    prompts = config.validation.prompts
    return read_prompts(Path(prompts)) if isinstance(prompts, str) else list(prompts)


def _named(config: RunConfig) -> Iterator[tuple[str, PartConfig]]:
    """The encoders that have a cache each, with the name of its folder."""
    assert config.encoder is not None  # a config with a cache has one
    seen: dict[str, int] = {}
    for leaf in leaves(config.encoder):
        seen[leaf.name] = number = seen.get(leaf.name, 0) + 1
        yield f"prompts-{leaf.name}" + (f"-{number}" if number > 1 else ""), leaf


def _latents(config: RunConfig, runtime: Runtime, **options: Any) -> Store:
    assert config.cache is not None and config.data is not None and config.backbone is not None
    # The denoiser's dtype is not the autoencoder's.
    backbone = config.backbone.model_dump(mode="json", exclude={"dtype"})
    identity = {
        "backbone": backbone,
        "data": sized(config).model_dump(mode="json"),
        "dtype": runtime.dtype,
        "weights": fingerprints(backbone, IMAGE_FOLDERS),
    }
    return Store(Path(config.cache.folder) / "latents", identity, **options)


def _prompts(config: RunConfig, name: str, leaf: PartConfig, runtime: Runtime, **options: Any) -> Store:
    assert config.cache is not None
    encoder = settings(leaf)
    identity = {"encoder": encoder, "dtype": runtime.dtype, "weights": fingerprints(encoder, TEXT_FOLDERS)}
    return Store(Path(config.cache.folder) / name, identity, **options)


def _shared(runtime: Runtime, **options: Any) -> dict[str, Any]:
    """Options of a store that all processes write to."""
    return {"writes": True, "rank": runtime.rank, "processes": runtime.world_size, **options}


def _wait(runtime: Runtime) -> None:
    """Returns when all processes are here."""
    runtime.gather(torch.zeros(1))


class _Rows(Dataset[dict[str, Any]]):
    """What caching needs of each of this process's items; its image only where that is not in the store yet."""

    def __init__(self, data: Data, items: range, there: set[bytes], keys: list[bytes], stamps: list[int]):
        self.data, self.items, self.there, self.keys, self.stamps = data, items, there, keys, stamps

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        index, key, stamp = self.items[row], UNREADABLE, 0
        try:
            stamp = self.data.image_stamp(index)
            known = index < len(self.keys) and stamp != 0 and self.stamps[index] == stamp
            key = self.keys[index] if known and self.keys[index] != UNREADABLE else self.data.image_key(index)
        except (OSError, ValueError):
            pass  # reading the item names and counts what is wrong
        image = None
        if key not in self.there:
            item = self.data.load_item(index)
            key, image = (UNREADABLE, None) if item is None else (key, item["image"])
        return {"key": key, "stamp": stamp, "image": image}


def _make_latents(
    config: RunConfig, data: Data, runtime: Runtime, batch_size: int, shard_bytes: int, progress: bool
) -> tuple[int, int]:
    store = _latents(config, runtime, **_shared(runtime, shard_bytes=shard_bytes))
    _wait(runtime)  # a shard that is written from here on is nobody's in the store as it was opened
    _check_deterministic(data)
    old_keys, old_stamps = [], torch.zeros(0, dtype=torch.int64)
    if (store.folder / ITEMS).is_file():
        old_keys, old_stamps = read_items(store.folder)
    before, there = len(store), set(store)
    items = range(runtime.rank, len(data), runtime.world_size)
    rows = _Rows(data, items, there, old_keys, old_stamps.tolist())
    loader = DataLoader(rows, batch_size=None, num_workers=config.loop.workers)
    keys, stamps, waiting = [], [], {}
    backbone: Any = None

    def encode() -> None:
        nonlocal backbone
        assert config.backbone is not None
        if backbone is None:  # only where something is missing
            backbone = config.backbone.build(runtime).eval()
        posteriors = backbone.posterior(torch.stack(list(waiting.values())))
        for key, posterior in zip(waiting, posteriors, strict=True):
            store.add(key, {"posterior": posterior})
        waiting.clear()

    for row in tqdm(loader, desc="latents", disable=not progress):
        keys.append(row["key"])
        stamps.append(row["stamp"])
        if row["image"] is not None and row["key"] not in store:
            waiting[row["key"]] = row["image"]
        if len(waiting) == batch_size:
            encode()
    if waiting:
        encode()
    store.flush()
    keys, stamps = _of_all(keys, stamps, len(data), runtime)
    if runtime.rank == 0:
        write_items(store.folder, keys, stamps)
    _wait(runtime)
    if all(key == UNREADABLE for key in keys):
        raise ValueError("no image of the data can be read")
    total = len(_latents(config, runtime))
    return total, total - before


def _of_all(keys: list[bytes], stamps: list[int], count: int, runtime: Runtime) -> tuple[list[bytes], list[int]]:
    """Keys and stamps of all ``count`` items, of which process r of n has those of r, r + n, r + 2n, ..."""
    most = -(-count // runtime.world_size)
    filling = most - len(keys)
    joined = bytearray(b"".join([*keys, *[UNREADABLE] * filling]))
    raw = torch.frombuffer(joined, dtype=torch.uint8).view(most, -1)
    numbers = torch.tensor([*stamps, *[0] * filling], dtype=torch.int64)

    def in_order(own: torch.Tensor) -> torch.Tensor:
        return runtime.gather(own).unflatten(0, (runtime.world_size, most)).transpose(0, 1).flatten(0, 1)[:count]

    return [row.numpy().tobytes() for row in in_order(raw)], in_order(numbers).tolist()


def _check_deterministic(data: Data) -> None:
    """Raises ValueError for data whose items are not the same ones each time, such as randomly flipped images."""
    for index in range(min(len(data), 2)):
        first, second = data.load_item(index), data.load_item(index)
        if first is None or second is None:
            continue
        if first["prompt"] != second["prompt"] or not torch.equal(first["image"], second["image"]):
            raise ValueError(
                f"the data draws its item {index} anew each time (a random crop or flip, or one of several captions), "
                "which a cache of latents would freeze; turn that off, or set cache.latents to false"
            )


def _make_prompts(
    config: RunConfig,
    name: str,
    leaf: PartConfig,
    prompts: list[str],
    runtime: Runtime,
    batch_size: int,
    shard_bytes: int,
    progress: bool,
) -> tuple[int, int]:
    store = _prompts(config, name, leaf, runtime, **_shared(runtime, shard_bytes=shard_bytes))
    _wait(runtime)  # as above: all have found the same ones missing
    missing = [prompt for prompt in prompts if prompt_key(prompt) not in store]
    chunks = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    if own := chunks[runtime.rank :: runtime.world_size]:
        _encode_prompts(name, leaf, own, store, runtime, progress)
    _wait(runtime)
    return len(_prompts(config, name, leaf, runtime)), len(missing)


def _encode_prompts(
    name: str, leaf: PartConfig, chunks: list[list[str]], store: Store, runtime: Runtime, progress: bool
) -> None:
    encoder = frozen_config(leaf).build(runtime).eval()
    if trained := [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]:
        raise ValueError(
            f"the encoder '{leaf.name}' has trainable weights ({trained[0]}, ...) that are not in its key 'adapter', "
            "so there is no frozen part to cache; set cache.prompts to false"
        )
    (empty,) = entries(encoder, [""], None)
    length = int(empty["length"])
    for chunk in tqdm(chunks, desc=name, disable=not progress):
        for prompt, entry in zip(chunk, entries(encoder, chunk, length), strict=True):
            store.add(prompt_key(prompt), entry)
    store.flush()
