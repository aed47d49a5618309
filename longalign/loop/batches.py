"""Orders and loads batches. The order does not depend on the number of processes, and can start at any step."""

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

#: threads that read image headers
READERS = 16


class Batches(Sampler[list[int]]):
    """Infinite batches of indices, reshuffled every epoch.

    All processes share one sequence of permutations, and each process takes its part of every global batch. So no item
    is repeated within an epoch. A global batch has items of one bucket: it is complete when the sequence has as many of
    this bucket. Batch ``k`` depends only on the seed, so a run can start at any ``k``.

    Args:
        length: number of items.
        batch_size: items per batch and process.
        seed: seed of the permutations.
        start: number of batches to skip, per process.
        rank: index of this process.
        world_size: number of processes.
        buckets: bucket of each item; negative for items to omit. None for one bucket.

    Raises:
        ValueError: if there are no items.
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
            raise ValueError("none of the images can be read; repair or replace the files")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.world_size, self.buckets = start, rank, world_size, buckets

    def __iter__(self) -> Iterator[list[int]]:
        part = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch in islice(self._global_batches(), self.start, None):
            yield batch[part]

    def _global_batches(self) -> Iterator[list[int]]:
        """Yields the batches of all processes together."""
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
    """The prompts of a dataset, without its images."""

    def __init__(self, data: Data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.data.prompt(index)}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collates items into a batch ``{"prompt": list[str], "image": (b, 3, h, w)}``.

    Cached items have ``posterior`` ``(b, 2c, h, w)`` instead of ``image``; prompt-only items have neither. Tensors of
    any key are stacked; other values become lists.

    Raises:
        ValueError: if the images' sizes differ.
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
    """Batches of a stream. Each of n workers makes every n-th batch, so the order of the batches is fixed.

    Args:
        data: the stream.
        batches: batch size, start position and rank of this process; the indices are not used.
        images: whether to load the images.
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
    """Returns the bucket of each item, for which the processes divide the work; None if there is one, or for a stream.

    Images that are not cached are opened for it, without decoding them.
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
    """Returns the `Batches` of a dataset; ``buckets`` is the result of `read_buckets`.

    For a stream, `load_batches` ignores the indices and uses only the arguments.
    """
    length = 1 if isinstance(data, Stream) else len(data)
    return Batches(length, batch_size, seed, start, rank, world_size, buckets)


def load_batches(
    data: Data | Stream, batches: Batches, needs_images: bool, workers: int, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields an infinite sequence of batches.

    Args:
        data: the data.
        batches: indices or, for a stream, positions of the batches.
        needs_images: whether to load images.
        workers: number of processes that load batches; 0 loads in this process.
        pin_memory: whether tensors are in page-locked memory, from which they are copied to a CUDA device while it
            computes.

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
