"""Precomputes the latents of a run and the hidden states of its frozen text models, and rejects outdated caches."""

from __future__ import annotations

from pathlib import Path

from longalign.caching.latents import has_latents, latent_store, make_latents
from longalign.caching.prompts import make_prompts, named_leaves, prompt_store
from longalign.config.run import RunConfig
from longalign.data.base import Data, spread_indices
from longalign.data.cached import CachedImages
from longalign.data.stream import Stream
from longalign.encoders.base import Encoder
from longalign.encoders.cached import build_cached, require_cached
from longalign.files.locks import Lock
from longalign.files.store import SHARD_BYTES
from longalign.runtime import Runtime


def make_caches(
    config: RunConfig,
    runtime: Runtime,
    batch_size: int = 16,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> dict[str, tuple[int, int]]:
    """Computes missing cache entries of a run. Existing entries are reused, so an interrupted call can be repeated.

    Several processes (``runtime.world_size``) split the images and prompts and write separate files (shards); the
    result equals that of one process. Two processes may encode duplicates of an image; one of the entries is used.

    Args:
        config: run config with ``cache`` and ``data``.
        runtime: device, dtype and processes; training must use the same dtype.
        batch_size: number of images or prompts that each process encodes at a time.
        shard_bytes: size in bytes of new entries after which a process writes a shard. An interrupted call loses the
            entries that are not written yet.
        progress: whether to show progress bars.

    Returns:
        For each folder of the cache, a pair: the number of all entries and the number of new ones, over all processes.
        The folders are ``"latents"`` and one per text encoder, e.g. ``"prompts-clip-segment"``.

    Raises:
        StaleCache: if the cache was made with different settings.
        ValueError: if a different program is writing the cache, the config has no ``cache`` or ``data``, the data is a
            stream or its items change between reads, or an encoder cannot be cached.
    """
    if config.cache is None or config.data is None:
        missing = [f"'{key}'" for key in ("data", "cache") if getattr(config, key) is None]
        raise ValueError(
            f"expected a config with 'data' and 'cache', got one without {' and '.join(missing)}; add the missing "
            "section, e.g. cache: {folder: runs/cache}"
        )
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
    if has_latents(config):
        counts["latents"] = make_latents(config, data, runtime, batch_size, shard_bytes, progress)
    if config.cache.prompts:
        prompts = list(dict.fromkeys(["", *_monitored(config, runtime), *(data.prompt(i) for i in range(len(data)))]))
        for name, leaf in named_leaves(config):
            counts[name] = make_prompts(config, name, leaf, prompts, runtime, batch_size, shard_bytes, progress)
    return counts


def _monitored(config: RunConfig, runtime: Runtime) -> list[str]:
    return [] if config.monitor is None else config.monitor.texts(runtime)


def check_caches(config: RunConfig, runtime: Runtime) -> None:
    """Checks that the caches of a run exist and match the config, without loading models or data.

    Raises:
        StaleCache: if a cache was made with different settings; the message lists the differences.
        FileNotFoundError: if a cache does not exist.
    """
    if has_latents(config):
        latent_store(config, runtime)
    if config.cache is not None and config.cache.prompts:
        for name, leaf in named_leaves(config):
            prompt_store(config, name, leaf, runtime)


def require_indexed(data: Data | Stream, config: RunConfig) -> Data:
    """Returns ``data`` if it is read by index (map-style); raises ValueError if it is a stream.

    ``config`` provides the name of the data for the message.
    """
    if isinstance(data, Stream):
        raise ValueError(
            f"data '{config.data and config.data.name}' is a stream, which a cache cannot index; "
            "use data that is read by index (folder, hf without streaming), or remove 'cache'"
        )
    return data


def cached_data(config: RunConfig, data: Data, runtime: Runtime) -> Data:
    """Returns the data with the autoencoder's cached posteriors (mean and standard deviation) instead of images.

    If the run does not cache latents, returns ``data`` unchanged.

    Raises:
        StaleCache: if the cache was made with different settings.
        FileNotFoundError: if the cache does not exist.
        ValueError: if the cache is incomplete, or the data has changed.
    """
    return CachedImages.load(data, latent_store(config, runtime)) if has_latents(config) else data


def cached_encoder(config: RunConfig, data: Data, runtime: Runtime) -> Encoder:
    """Returns an encoder that reads cached states; the text models are not loaded.

    Checks that the cache contains the prompts of the config's ``monitor`` and up to 32 evenly spread prompts of the
    data.

    Raises:
        StaleCache: if a cache was made with different settings.
        FileNotFoundError: if a cache does not exist.
        ValueError: if a checked prompt is not in the cache.
    """
    stores = [prompt_store(config, name, leaf, runtime) for name, leaf in named_leaves(config)]
    checked = [data.prompt(i) for i in spread_indices(len(data))]
    for prompt in ["", *_monitored(config, runtime), *checked]:
        for store in stores:
            require_cached(store, prompt)
    assert config.encoder is not None
    return build_cached(config.encoder, iter(stores), runtime)
