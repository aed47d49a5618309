"""Precomputed latents and frozen text states of a run. Stale caches are rejected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from longalign.caching.fingerprint import fingerprints
from longalign.caching.store import SHARD_BYTES, Store
from longalign.config.run import RunConfig
from longalign.data.base import Data
from longalign.data.cached import ITEMS, UNREADABLE, CachedImages, read_items, write_items
from longalign.data.lines import read_prompts
from longalign.data.stream import Stream
from longalign.encoders.base import Encoder
from longalign.encoders.cached import (
    build_cached,
    entries,
    prompt_key,
    require_cached,
    settings,
)
from longalign.encoders.config import EncoderConfig
from longalign.loop.locks import Lock
from longalign.names import unique_name
from longalign.runtime import Runtime

TEXT_FOLDERS = ("text_encoder", "tokenizer")
IMAGE_FOLDERS = ("vae",)
NUM_CHECKED = 32


def make_caches(
    config: RunConfig,
    runtime: Runtime,
    batch_size: int = 16,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> dict[str, tuple[int, int]]:
    """Computes missing cache entries of a run. Existing entries are reused, so an interrupted call can be repeated.

    Several processes (``runtime.world_size``) split the images and prompts and write separate shards; the result equals
    that of one process. Two processes may encode duplicates of an image; one of the entries is used.

    Args:
        config: run config with ``cache``.
        runtime: device, dtype and processes; training must use the same dtype.
        batch_size: number of images or prompts to encode at a time.
        shard_bytes: size of a shard; an interrupted call loses the last, incomplete shard.
        progress: whether to show progress bars.

    Returns:
        For each part of the cache, the number of entries and the number of new ones, over all processes.

    Raises:
        StaleCache: if the cache was made with different settings.
        ValueError: if a different process is writing the cache, the config has no ``cache`` or ``data``, the data is a
            stream or its items change between reads, or an encoder cannot be cached.
    """
    if config.cache is None or config.data is None:
        raise ValueError("expected a config with 'data' and 'cache', e.g. cache: {folder: runs/cache}")
    data = require_indexed(config.data.for_backbone(config.backbone).build(runtime), config)
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
    counts = {}
    if _has_latents(config):
        counts["latents"] = _make_latents(config, data, runtime, batch_size, shard_bytes, progress)
    if config.cache.prompts:
        prompts = list(dict.fromkeys(["", *_validation_prompts(config), *(data.prompt(i) for i in range(len(data)))]))
        for name, leaf in _named(config):
            counts[name] = _make_prompts(config, name, leaf, prompts, runtime, batch_size, shard_bytes, progress)
    return counts


def check_caches(config: RunConfig, runtime: Runtime) -> None:
    """Checks that the caches of a run exist and match its config, without loading models or data.

    Raises:
        StaleCache: if a cache was made with different settings; the message lists the differences.
        FileNotFoundError: if a cache does not exist.
    """
    if _has_latents(config):
        _latents(config, runtime)
    if config.cache is not None and config.cache.prompts:
        for name, leaf in _named(config):
            _prompts(config, name, leaf, runtime)


def require_indexed(data: Data | Stream, config: RunConfig) -> Data:
    """Returns map-style data unchanged. Raises ValueError for a stream."""
    if isinstance(data, Stream):
        raise ValueError(
            f"the data '{config.data and config.data.name}' is a stream without stable indices to key a cache by; "
            "use data that is read by index (folder, hf without streaming), or remove 'cache'"
        )
    return data


def cached_data(config: RunConfig, data: Data, runtime: Runtime) -> Data:
    """The data with latents instead of images, if the run caches latents."""
    return CachedImages.load(data, _latents(config, runtime)) if _has_latents(config) else data


def cached_encoder(config: RunConfig, data: Data, runtime: Runtime) -> Encoder:
    """Encoder that reads cached text states, so that its text models need not be loaded.

    Raises:
        ValueError: if a validation prompt, or one of the checked prompts of the data, is not in the cache.
    """
    stores = [_prompts(config, name, leaf, runtime) for name, leaf in _named(config)]
    last = len(data) - 1
    checked = [data.prompt(i) for i in sorted({i * last // (NUM_CHECKED - 1) for i in range(NUM_CHECKED)})]
    for prompt in ["", *_validation_prompts(config), *checked]:
        for store in stores:
            require_cached(store, prompt)
    remaining = iter(stores)
    assert config.encoder is not None
    return build_cached(config.encoder, lambda leaf: next(remaining), runtime)


def _has_latents(config: RunConfig) -> bool:
    if config.cache is None or config.data is None:
        return False
    return config.data.has_images if config.cache.latents is None else config.cache.latents


def _validation_prompts(config: RunConfig) -> list[str]:
    if config.validation is None:
        return []
    prompts = config.validation.prompts
    return read_prompts(Path(prompts)) if isinstance(prompts, str) else list(prompts)


def _named(config: RunConfig) -> Iterator[tuple[str, EncoderConfig]]:
    """Encoders with a cache of their own, each with the name of its folder."""
    assert config.encoder is not None  # a config with a cache has one
    names: set[str] = set()
    for leaf in config.encoder.leaves():
        name = unique_name(f"prompts-{leaf.name}", names)
        names.add(name)
        yield name, leaf


def _latents(config: RunConfig, runtime: Runtime, **options: Any) -> Store:
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


def _prompts(config: RunConfig, name: str, leaf: EncoderConfig, runtime: Runtime, **options: Any) -> Store:
    assert config.cache is not None
    encoder = settings(leaf)
    identity = {"encoder": encoder, "dtype": runtime.dtype, "weights": fingerprints(encoder, TEXT_FOLDERS)}
    return Store(Path(config.cache.folder) / name, identity, **options)


def _writer_options(runtime: Runtime, **options: Any) -> dict[str, Any]:
    """Options of a store that all processes write to."""
    return {"writable": True, "rank": runtime.rank, "processes": runtime.world_size, **options}


def _wait(runtime: Runtime) -> None:
    """Blocks until all processes have called it."""
    runtime.gather(torch.zeros(1))


class _Rows(Dataset[dict[str, Any]]):
    """Key, stamp and image of each item of this process; the image is None if the store already has it."""

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
        return {"key": key, "stamp": stamp, "image": image}


def _make_latents(
    config: RunConfig, data: Data, runtime: Runtime, batch_size: int, shard_bytes: int, progress: bool
) -> tuple[int, int]:
    store = _latents(config, runtime, **_writer_options(runtime, shard_bytes=shard_bytes))
    _wait(runtime)  # every process must have opened the store before any new shard is written
    _check_deterministic(data)
    old_keys, old_stamps = [], torch.zeros(0, dtype=torch.int64)
    if (store.folder / ITEMS).is_file():
        old_keys, old_stamps = read_items(store.folder)
    num_before, stored = len(store), set(store)
    items = range(runtime.rank, len(data), runtime.world_size)
    rows = _Rows(data, items, stored, old_keys, old_stamps.tolist())
    loader = DataLoader(rows, batch_size=None, num_workers=config.loop.workers)
    keys, stamps, pending = [], [], {}
    backbone: Any = None

    def encode() -> None:
        nonlocal backbone
        assert config.backbone is not None
        if backbone is None:  # built only if an entry is missing
            backbone = config.backbone.build(runtime).eval()
        posteriors = backbone.posterior(torch.stack(list(pending.values())))
        for key, posterior in zip(pending, posteriors, strict=True):
            store.add(key, {"posterior": posterior})
        pending.clear()

    for row in tqdm(loader, desc="latents", disable=not progress):
        keys.append(row["key"])
        stamps.append(row["stamp"])
        if row["image"] is not None and row["key"] not in store:
            pending[row["key"]] = row["image"]
        if len(pending) == batch_size:
            encode()
    if pending:
        encode()
    store.flush()
    keys, stamps = _gather_items(keys, stamps, len(data), runtime)
    if runtime.rank == 0:
        write_items(store.folder, keys, stamps)
    _wait(runtime)
    if all(key == UNREADABLE for key in keys):
        raise ValueError("no image of the data can be read")
    total = len(_latents(config, runtime))
    return total, total - num_before


def _gather_items(keys: list[bytes], stamps: list[int], count: int, runtime: Runtime) -> tuple[list[bytes], list[int]]:
    """Gathers keys and stamps of all ``count`` items; process r of n has items r, r + n, r + 2n, ..."""
    length = -(-count // runtime.world_size)
    padding = length - len(keys)
    joined = bytearray(b"".join([*keys, *[UNREADABLE] * padding]))
    key_rows = torch.frombuffer(joined, dtype=torch.uint8).view(length, -1)
    stamp_rows = torch.tensor([*stamps, *[0] * padding], dtype=torch.int64)

    def gather(rows: torch.Tensor) -> torch.Tensor:
        return runtime.gather(rows).unflatten(0, (runtime.world_size, length)).transpose(0, 1).flatten(0, 1)[:count]

    return [row.numpy().tobytes() for row in gather(key_rows)], gather(stamp_rows).tolist()


def _check_deterministic(data: Data) -> None:
    """Raises ValueError if items change between reads, e.g. randomly flipped images."""
    for index in range(min(len(data), 2)):
        first, second = data.load_item(index), data.load_item(index)
        if first is None or second is None:
            continue
        if first["prompt"] != second["prompt"] or not torch.equal(first["image"], second["image"]):
            raise ValueError(
                f"item {index} of the data changes between reads (random crop, flip or caption), which a cache of "
                "latents would freeze; turn the randomness off, or set cache.latents to false"
            )


def _make_prompts(
    config: RunConfig,
    name: str,
    leaf: EncoderConfig,
    prompts: list[str],
    runtime: Runtime,
    batch_size: int,
    shard_bytes: int,
    progress: bool,
) -> tuple[int, int]:
    store = _prompts(config, name, leaf, runtime, **_writer_options(runtime, shard_bytes=shard_bytes))
    _wait(runtime)  # every process must find the same prompts missing
    missing = [prompt for prompt in prompts if prompt_key(prompt) not in store]
    chunks = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    if local_chunks := chunks[runtime.rank :: runtime.world_size]:
        _encode_prompts(name, leaf, local_chunks, store, runtime, progress)
    _wait(runtime)
    return len(_prompts(config, name, leaf, runtime)), len(missing)


def _encode_prompts(
    name: str, leaf: EncoderConfig, chunks: list[list[str]], store: Store, runtime: Runtime, progress: bool
) -> None:
    encoder = leaf.frozen_config().build(runtime).eval()
    if trained := [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]:
        raise ValueError(
            f"the encoder '{leaf.name}' has trainable weights ({trained[0]}, ...) outside of its key 'adapter', so "
            "it has no frozen part to cache; set cache.prompts to false"
        )
    (empty,) = entries(encoder, [""], None)
    length = int(empty["length"])
    for chunk in tqdm(chunks, desc=name, disable=not progress):
        for prompt, entry in zip(chunk, entries(encoder, chunk, length), strict=True):
            store.add(prompt_key(prompt), entry)
    store.flush()
