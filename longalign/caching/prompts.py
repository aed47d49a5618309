"""Caches the hidden states of a run's prompts, in a separate store for each text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longalign.caching.processes import wait, writer_options
from longalign.config.run import RunConfig
from longalign.encoders.cached import entries, prompt_key, settings
from longalign.encoders.config import EncoderConfig
from longalign.files.fingerprint import fingerprints
from longalign.files.store import Store
from longalign.names import unique_name
from longalign.runtime import Runtime

TEXT_FOLDERS = ("text_encoder", "tokenizer")


def named_leaves(config: RunConfig) -> Iterator[tuple[str, EncoderConfig]]:
    """Yields ``(name, leaf)`` for each encoder of a run that is cached separately.

    ``name`` is the name of the encoder's folder in the cache, e.g. ``prompts-t5``; ``leaf`` is the encoder's config,
    one of `EncoderConfig.leaves`.
    """
    assert config.encoder is not None  # a config with a cache has one
    names: set[str] = set()
    for leaf in config.encoder.leaves():
        name = unique_name(f"prompts-{leaf.name}", names)
        names.add(name)
        yield name, leaf


def prompt_store(config: RunConfig, name: str, leaf: EncoderConfig, runtime: Runtime, **options: Any) -> Store:
    """Opens and returns the store of one encoder's states.

    The store's ``identity`` (see `longalign.files.store.Store`) contains the settings that determine the states.

    Args:
        config: the run's config.
        name: name of the store's folder; see `named_leaves`.
        leaf: config of the encoder; see `named_leaves`.
        runtime: gives the dtype of the states.
        **options: further keyword arguments of `Store`, e.g. ``writable``.

    Raises:
        StaleCache: if the store was made with different settings.
        FileNotFoundError: if there is no store, and ``writable`` is not True.
        ValueError: if a file of the store is damaged.
    """
    assert config.cache is not None
    encoder = settings(leaf)
    identity = {"encoder": encoder, "dtype": runtime.dtype, "weights": fingerprints(encoder, TEXT_FOLDERS)}
    return Store(Path(config.cache.folder) / name, identity, **options)


def make_prompts(
    config: RunConfig,
    name: str,
    leaf: EncoderConfig,
    prompts: list[str],
    runtime: Runtime,
    batch_size: int,
    shard_bytes: int,
    progress: bool,
) -> tuple[int, int]:
    """Encodes, with one encoder, the prompts that its store does not contain yet, split over all processes.

    Args:
        config: the run's config.
        name: name of the store's folder; see `named_leaves`.
        leaf: config of the encoder; see `named_leaves`.
        prompts: distinct prompts, including the empty one.
        runtime: device, dtype and processes.
        batch_size: number of prompts per call of the encoder.
        shard_bytes: number of bytes of new entries after which a process writes a file.
        progress: whether to show a progress bar.

    Returns:
        The number of all entries of the store and the number of new ones, over all processes.

    Raises:
        StaleCache: if the store was made with different settings.
        ValueError: if the states of the encoder cannot be cached.
    """
    store = prompt_store(config, name, leaf, runtime, **writer_options(runtime, shard_bytes))
    wait(runtime)  # every process must find the same prompts missing
    missing = [prompt for prompt in prompts if prompt_key(prompt) not in store]
    chunks = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    if local_chunks := chunks[runtime.rank :: runtime.world_size]:
        _encode_prompts(name, leaf, local_chunks, store, runtime, progress)
    wait(runtime)
    return len(store.reopened()), len(missing)


def _encode_prompts(
    name: str, leaf: EncoderConfig, chunks: list[list[str]], store: Store, runtime: Runtime, progress: bool
) -> None:
    encoder = leaf.frozen_config().build(runtime).eval()
    if trained := [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]:
        raise ValueError(
            f"the encoder '{leaf.name}' has trainable weights ({trained[0]}, ...) outside of its adapter, so it "
            "has no frozen part to cache; set cache.prompts to false"
        )
    (empty,) = entries(encoder, [""], None)
    length = int(empty["length"])
    for chunk in tqdm(chunks, desc=name, disable=not progress):
        for prompt, entry in zip(chunk, entries(encoder, chunk, length), strict=True):
            store.add(prompt_key(prompt), entry)
    store.flush()
