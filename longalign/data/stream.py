"""Base class of data that is read sequentially, shard by shard."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.data.images.base import UNREADABLE, SquareLoader, Unreadable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One stored item.

    Attributes:
        name: name of the item in messages.
        prompt: caption.
        image: path or encoded bytes of the image; None for prompt-only data.
        problem: why the item cannot be used; empty if it can.
    """

    name: str
    prompt: str = ""
    image: Path | bytes | None = None
    problem: str = ""


class Stream:
    """Infinite sharded stream, reshuffled every epoch.

    Shards are distributed over processes and their workers. With fewer shards than workers, each worker reads all
    shards and uses every n-th record. Shards are shuffled per worker, records in a buffer. The order depends only on
    the seed and the numbers of processes and workers, so a resumed run continues where it stopped. Workers with fewer
    records repeat them more often.

    Args:
        resolution: image side in pixels; ignored for prompt-only data.
        empty: ``"skip"`` or ``"keep"``: what to do with items with an empty caption.
        max_unreadable: number of unreadable images to replace by the next readable one; one more raises an error.
        shuffle_buffer: shuffle buffer size; 1 keeps the order.
    """

    has_images: bool = True

    def __init__(self, *, resolution: int | None, empty: str, max_unreadable: int, shuffle_buffer: int):
        self.loader = SquareLoader(resolution) if self.has_images else None
        self.empty, self.shuffle_buffer = empty, shuffle_buffer
        self.unreadable = Unreadable(max_unreadable)
        self._warned_empty = False

    @property
    def num_shards(self) -> int:
        """Number of shards, which are distributed over processes and data loading workers."""
        raise NotImplementedError

    def read(self, shard: int) -> Iterator[Record]:
        """Yields the records of a shard in order."""
        raise NotImplementedError

    def items(
        self, seed: int, part: int = 0, num_parts: int = 1, skip: int = 0, images: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Yields items ``{"prompt": str, "image": (3, resolution, resolution) in [0, 1]}`` forever.

        Args:
            seed: shuffling seed.
            part: index of the reader, a data loading worker of a process. Readers get disjoint records.
            num_parts: number of readers in all processes.
            skip: number of items to skip at the start, without decoding them.
            images: whether items have images.

        Raises:
            ValueError: if too many images cannot be read, or there are no items for this reader.
        """
        # The next readable image also fills the slots of unreadable ones: `skip` then counts records undecoded.
        slots = 0
        for number, record in enumerate(self._records(seed, part, num_parts)):
            if number < skip:
                continue
            slots += 1
            item: dict[str, Any] = {"prompt": record.prompt}
            try:
                if record.name in self.unreadable:
                    raise ValueError(self.unreadable[record.name])
                if record.problem:
                    raise ValueError(record.problem)
                if images:
                    if record.image is None or self.loader is None:
                        raise ValueError("the item has no image")
                    item["image"] = self.loader.load(record.name, record.image)
            except UNREADABLE as error:
                self.unreadable.note(record.name, error)
                # Unreadable records can end one epoch and start the next; with more than these, an epoch has no others.
                if slots > 2 * self.unreadable.limit:
                    raise ValueError(
                        f"no image can be read: {self.unreadable.summary()}. Repair or replace the files"
                    ) from error
                continue
            for _ in range(slots):
                yield item
            slots = 0

    def _records(self, seed: int, part: int, num_parts: int) -> Iterator[Record]:
        epoch = 0
        while True:
            rng = random.Random(f"{seed} {part} {num_parts} {epoch}")
            is_empty = True
            for record in self._shuffled(self._in_order(rng, part, num_parts), rng):
                is_empty = False
                yield record
            if is_empty:
                cause = f"; {self.unreadable.summary()}" if self.unreadable else ""
                raise ValueError(
                    f"data loading worker {part} of {num_parts} got no item with a caption{cause}; lower loop.workers, "
                    "or check the captions"
                )
            epoch += 1

    def _in_order(self, rng: random.Random, part: int, num_parts: int) -> Iterator[Record]:
        split_shards = self.num_shards >= num_parts
        shards = list(range(self.num_shards))[part::num_parts] if split_shards else list(range(self.num_shards))
        rng.shuffle(shards)
        for shard in shards:
            for number, record in enumerate(self.read(shard)):
                if not split_shards and number % num_parts != part:
                    continue
                if not record.prompt and not record.problem and self.empty == "skip":
                    if not self._warned_empty:
                        log.warning("%s has an empty caption; such items are skipped", record.name)
                    self._warned_empty = True
                    continue
                yield record

    def _shuffled(self, records: Iterator[Record], rng: random.Random) -> Iterator[Record]:
        buffer: list[Record] = []
        for record in records:
            if len(buffer) < self.shuffle_buffer:
                buffer.append(record)
                continue
            i = rng.randrange(len(buffer))
            buffer[i], record = record, buffer[i]
            yield record
        rng.shuffle(buffer)
        yield from buffer
