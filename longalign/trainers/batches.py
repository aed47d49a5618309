"""Which items make which batch: the same on any number of processes, and from any step on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from longalign.data.base import Data
from longalign.data.stream import Stream
from longalign.trainers.interrupt import outlive_signals


class Batches(Sampler[list[int]]):
    """Endless batches of indices out of shuffled passes over the data.

    All processes read one stream of permutations, each its own part of every global batch, so no item is seen twice
    in a pass. Batch ``k`` depends on the seed alone, so a run can start at any ``k``.

    Args:
        length: number of items.
        batch_size: items per batch and process.
        seed: of the shuffles.
        start: batches of each process to leave out.
        rank: number of this process.
        processes: how many there are.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, processes: int = 1):
        if length < 1:
            raise ValueError("the data is empty; expected at least one item")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.processes = start, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        position = (self.start * self.processes + self.rank) * self.batch_size
        shuffled_pass, order = -1, []
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                if place // self.length != shuffled_pass:
                    shuffled_pass = place // self.length
                    generator = torch.Generator().manual_seed((self.seed * 1_000_003 + shuffled_pass) % 2**63)
                    order = torch.randperm(self.length, generator=generator).tolist()
                batch.append(order[place % self.length])
            yield batch
            position += self.batch_size * self.processes


class Prompts(Dataset[dict[str, Any]]):
    """The prompts of data, without loading its images."""

    def __init__(self, data: Data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.data.prompt(index)}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items as a batch ``{"prompt": list[str], "image": (b, 3, h, w)}``, with ``posterior`` ``(b, 2c, h, w)`` in the
    place of ``image`` where that is cached, and with neither where there are prompts alone. Whatever else items have is
    batched likewise: tensors stacked, other values as a list.

    Raises:
        ValueError: if the images' sizes differ.
    """
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    for key, values in batch.items():
        if not isinstance(values[0], torch.Tensor):
            continue
        sizes = {tuple(value.shape) for value in values}
        if len(sizes) > 1:
            raise ValueError(f"expected images of one size in a batch, got {sorted(sizes)}; set the data's resolution")
        batch[key] = torch.stack(values)
    return batch


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """Batches of a stream, of which each worker makes every so manieth, so that they come in one fixed order.

    Args:
        data: the stream.
        batches: says how large they are, where to start, and which process this is.
        images: whether items have their image.
    """

    def __init__(self, data: Stream, batches: Batches, images: bool):
        self.data, self.batches, self.images = data, batches, images

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info, plan = get_worker_info(), self.batches
        workers = 1 if info is None else info.num_workers
        # the batch to start at belongs to the worker that would have made it in an uninterrupted run
        worker = ((0 if info is None else info.id) + plan.start) % workers
        made = (plan.start - worker + workers - 1) // workers
        share, shares = plan.rank * workers + worker, plan.processes * workers
        items = self.data.items(plan.seed, share, shares, made * plan.batch_size, self.images)
        while True:
            yield collate([next(items) for _ in range(plan.batch_size)])


def plan_batches(data: Data | Stream, batch_size: int, seed: int, start: int, rank: int, processes: int) -> Batches:
    """The `Batches` of data; those of a stream say where to start, not which items, for a stream has no indices."""
    length = 1 if isinstance(data, Stream) else len(data)
    return Batches(length, batch_size, seed, start, rank, processes)


def load_batches(data: Data | Stream, batches: Batches, needs_images: bool, workers: int) -> Iterator[dict[str, Any]]:
    """Endless batches of data, loaded by ``workers`` processes.

    Raises:
        ValueError: if images are needed and there are none.
    """
    if needs_images and not data.has_images:
        raise ValueError("the trainer needs images, and the data has prompts only; choose data with images")
    # its own generator, so that starting to load leaves the training's random numbers alone
    generator = torch.Generator().manual_seed(batches.seed)
    if isinstance(data, Stream):
        streamed = StreamedBatches(data, batches, needs_images)
        return iter(
            DataLoader(
                streamed, batch_size=None, num_workers=workers, worker_init_fn=outlive_signals, generator=generator
            )
        )
    loader = DataLoader(
        data if needs_images else Prompts(data),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=outlive_signals,
        generator=generator,
    )
    return iter(loader)
