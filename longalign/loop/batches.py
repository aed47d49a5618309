"""Arranges the items of the data in batches and loads them. Loading can start at any step of a run."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from longalign.caching.processes import gather_rows
from longalign.data.base import Data
from longalign.data.stream import Stream
from longalign.loop.interrupt import ignore_signals
from longalign.runtime import Runtime

log = logging.getLogger("longalign")

#: number of threads in which `read_buckets` reads image headers
READERS = 16


class Batches(Sampler[list[int]]):
    """Infinite sequence of the batches of one process, as lists of item indices, reshuffled every epoch.

    A global batch consists of the batches of all processes. All processes compute the same global batches and take
    their own slice of each, so an item occurs once per epoch. All images of a global batch have one size, i.e. are from
    one *bucket*. Items are collected for each bucket until they fill a global batch. The k-th global batch does not
    depend on ``start``, so a run can start at any k.

    Args:
        length: number of items in the data.
        batch_size: number of items per batch of one process.
        seed: seed of the permutations of the items.
        start: number of global batches to skip.
        rank: index of this process, from 0.
        world_size: number of processes.
        buckets: index of the image size of each item, from `read_buckets`; items with a negative index are omitted.
            None if all images have one size.

    Raises:
        ValueError: if there are no items, or if all are omitted.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buckets: Sequence[int] | None = None,
    ):
        if length < 1:
            raise ValueError("the data is empty; provide at least one item")
        if buckets is not None and max(buckets) < 0:
            raise ValueError(f"none of the {length} images can be read; repair or replace the files")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.world_size, self.buckets = start, rank, world_size, buckets

    def __iter__(self) -> Iterator[list[int]]:
        part = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch in islice(self._global_batches(), self.start, None):
            yield batch[part]

    def _global_batches(self) -> Iterator[list[int]]:
        """Yields the global batches, each ``batch_size * world_size`` item indices."""
        size, waiting = self.batch_size * self.world_size, defaultdict[int, list[int]](list)
        for epoch in count():
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            for item in torch.randperm(self.length, generator=generator).tolist():
                bucket = 0 if self.buckets is None else self.buckets[item]
                if bucket < 0:
                    continue
                waiting[bucket].append(item)
                if len(waiting[bucket]) == size:
                    yield waiting.pop(bucket)


class PromptDataset(Dataset[dict[str, Any]]):
    """Items ``{"prompt": str}`` of some data, whose images are not loaded."""

    def __init__(self, data: Data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.data.prompt(index)}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collates b items with equal keys into one batch: tensors are stacked to ``(b, ...)``, other values are listed.

    A usual batch is ``{"prompt": list[str], "image": (b, 3, h, w)}`` with pixels in [0, 1]. With a latent cache,
    ``posterior`` ``(b, 2c, h, w)`` replaces ``image``: mean and standard deviation of the VAE's posterior. Prompt-only
    data has neither.

    Raises:
        ValueError: if the tensors of a key differ in shape.
    """
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    for key, values in batch.items():
        if not isinstance(values[0], torch.Tensor):
            continue
        sizes = {tuple(value.shape) for value in values}
        if len(sizes) > 1:
            raise ValueError(f"expected images of one size in a batch, got {sorted(sizes)}; set `resolution` in data")
        batch[key] = torch.stack(values)
    return batch


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """Infinite sequence of the collated batches of a stream, which is data that is read in order.

    Each of n loading workers makes every n-th batch, so the order does not depend on their speed.

    Args:
        data: the stream.
        batches: provides seed, batch size, number of batches to skip, rank and number of processes. The item indices
            in it are not used.
        images: whether to load the images; otherwise items have only prompts.
    """

    def __init__(self, data: Stream, batches: Batches, images: bool):
        self.data, self.batches, self.images = data, batches, images

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info, plan = get_worker_info(), self.batches
        workers = 1 if info is None else info.num_workers
        # as in an uninterrupted run, worker k makes the batches whose number is k modulo the number of workers
        worker = ((0 if info is None else info.id) + plan.start) % workers
        num_skipped = (plan.start - worker + workers - 1) // workers
        reader, num_readers = plan.rank * workers + worker, plan.world_size * workers
        skip = num_skipped * plan.batch_size
        items = self.data.items(plan.seed, reader, num_readers, skip, self.images, plan.batch_size)
        while True:
            yield collate([next(items) for _ in range(plan.batch_size)])


def read_buckets(data: Data | Stream, runtime: Runtime) -> list[int] | None:
    """Returns the index in ``data.buckets`` of each item's image size, or -1 if the image cannot be read.

    The processes divide the work. Images that are not cached are opened, but not decoded.

    Returns:
        One index per item, the same in all processes; None for a stream, and if all images have one size.
    """
    if isinstance(data, Stream) or len(data.buckets) < 2:
        return None
    with ThreadPoolExecutor(READERS) as pool:
        rows = list(pool.map(data.bucket, range(runtime.rank, len(data), runtime.world_size)))
    numbers = gather_rows(torch.tensor(rows, dtype=torch.int64, device=runtime.device), len(data), runtime).tolist()
    if runtime.rank == 0:
        counts = Counter(numbers)
        log.info("images per size: %s", ", ".join(f"{size}: {counts[i]}" for i, size in enumerate(data.buckets)))
    return numbers


def plan_batches(
    data: Data | Stream,
    batch_size: int,
    seed: int,
    start: int,
    rank: int,
    world_size: int,
    buckets: Sequence[int] | None = None,
) -> Batches:
    """Returns the `Batches` of some data; the arguments are those of `Batches`, with the data instead of its length.

    For a stream, the item indices have no meaning: `load_batches` uses the attributes of the `Batches` only.
    """
    length = 1 if isinstance(data, Stream) else len(data)
    return Batches(length, batch_size, seed, start, rank, world_size, buckets)


def load_batches(
    data: Data | Stream, batches: Batches, needs_images: bool, workers: int, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """Returns an infinite iterator over the batches of this process; see `collate` for a batch.

    Args:
        data: the data.
        batches: the item indices of each batch; for a stream, only the attributes of this object are used.
        needs_images: whether to load images; otherwise batches have only prompts.
        workers: number of processes that load batches; 0 loads in this process.
        pin_memory: whether to put tensors into page-locked memory, from which they can be copied to a CUDA device
            while the device computes.

    Raises:
        ValueError: if images are needed and the data has none.
    """
    if needs_images and not data.has_images:
        raise ValueError("the trainer needs images, but the data has prompts only; choose data with images")
    # separate generator: creating the loader must not consume the training RNG
    generator = torch.Generator().manual_seed(batches.seed)
    if isinstance(data, Stream):
        streamed = StreamedBatches(data, batches, needs_images)
        return iter(
            DataLoader(
                streamed,
                batch_size=None,
                num_workers=workers,
                worker_init_fn=ignore_signals,
                generator=generator,
                pin_memory=pin_memory,
            )
        )
    loader = DataLoader(
        data if needs_images else PromptDataset(data),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        generator=generator,
        pin_memory=pin_memory,
    )
    return iter(loader)
