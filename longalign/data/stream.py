"""Base class of data that is read sequentially, shard by shard. A shard is one file or another part of the data."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from longalign.data.images.base import UNREADABLE, ImageLoader, Resolution, Unreadable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One item of a stream as it is stored, before its image is decoded.

    Attributes:
        name: name of the item in messages.
        prompt: caption without surrounding whitespace; may be empty.
        image: path of the image file, or the bytes of such a file; None for prompt-only data.
        problem: why the item cannot be used, as text; empty if it can.
    """

    name: str
    prompt: str = ""
    image: Path | bytes | None = None
    problem: str = ""


class Stream:
    """Base class of infinite streams of captioned images or prompts, reshuffled every epoch.

    A reader is one data loading worker of one process. Shards are distributed over the readers. If there are fewer
    shards than readers, each of the n readers reads all shards and uses every n-th record. Each reader shuffles its
    shards, and the records in a buffer. The order depends only on the seed and the number of readers, so a resumed run
    continues where it stopped. Readers with fewer records repeat them more often.

    Args:
        resolution: side of square images in pixels, or a list of image sizes; ignored for prompt-only data. See
            `ImageLoader`.
        empty: ``"skip"`` or ``"keep"``: what to do with items with an empty caption.
        max_unreadable: number of unreadable images that each reader replaces by the next readable one in the whole
            run; one more raises an error.
        shuffle_buffer: number of records in the shuffle buffer of each reader; 1 keeps the order of the records.
    """

    #: whether items have an image; otherwise only a prompt
    has_images: bool = True

    def __init__(self, *, resolution: Resolution, empty: str, max_unreadable: int, shuffle_buffer: int):
        self.loader = ImageLoader(resolution) if self.has_images else None
        self.empty, self.shuffle_buffer = empty, shuffle_buffer
        self.unreadable = Unreadable(max_unreadable)
        self._warned_empty = False

    @property
    def num_shards(self) -> int:
        """Number of shards of the data."""
        raise NotImplementedError(f"{type(self).__name__} has no num_shards; implement it")

    def read(self, shard: int) -> Iterator[Record]:
        """Yields the records of the shard with the index ``shard``, in their stored order."""
        raise NotImplementedError(f"{type(self).__name__} has no method read; implement it")

    def items(
        self,
        seed: int,
        part: int = 0,
        num_parts: int = 1,
        skip: int = 0,
        images: bool = True,
        batch_size: int = 1,
    ) -> Iterator[dict[str, Any]]:
        """Yields items ``{"prompt": str, "image": float32 (3, h, w) in [0, 1]}`` forever.

        Args:
            seed: shuffling seed.
            part: index of the reader, see `Stream`. Readers get disjoint records.
            num_parts: number of readers in all processes.
            skip: number of items to skip at the start, without decoding them; a multiple of ``batch_size``.
            images: whether items have an image; False decodes no images. Must be False for prompt-only data.
            batch_size: each group of this many consecutive items has images of one size, i.e. of one bucket.

        Raises:
            ValueError: if more than ``max_unreadable`` images cannot be read, or this reader has no items.
        """
        # Readable images also fill the slots of unreadable ones in their group, and of groups that have none before it:
        # `skip` then counts records undecoded.
        slots = 0
        groups = self._groups(self._records(seed, part, num_parts), batch_size, images)
        for bucket, records in islice(groups, skip // batch_size, None):
            slots += 1
            items = [self._item(record, bucket, images) for record in records]
            if all(item is None for item in items):
                self._check_any(slots)
                continue
            filled = [next(item for item in items[i:] + items if item is not None) for i in range(len(items))]
            for _ in range(slots):
                yield from filled
            slots = 0

    def _groups(self, records: Iterator[Record], size: int, images: bool) -> Iterator[tuple[int, list[Record]]]:
        """Yields (index of a bucket, group of ``size`` records of this bucket).

        A group begins with the first record of its bucket that is in no other group. With several buckets, records
        whose image header cannot be read are dropped.
        """
        sort = images and self.loader is not None and len(self.loader.sizes) > 1
        waiting: dict[int, list[Record]] = defaultdict(list)
        dropped = 0
        for record in records:
            bucket = self._bucket(record) if sort else 0
            if bucket < 0:
                dropped += 1
                self._check_any(dropped)
                continue
            dropped = 0
            waiting[bucket].append(record)
            if len(waiting[bucket]) == size:
                yield bucket, waiting.pop(bucket)

    def _bucket(self, record: Record) -> int:
        try:
            assert self.loader is not None
            return self.loader.bucket(self._image(record))
        except UNREADABLE as error:
            self.unreadable.note(record.name, error)
            return -1

    def _item(self, record: Record, bucket: int, images: bool) -> dict[str, Any] | None:
        """Returns the item of a record, or None if the record cannot be used, which is noted in ``unreadable``."""
        try:
            if record.name in self.unreadable:
                raise ValueError(self.unreadable[record.name])
            if images:
                assert self.loader is not None
                return {"prompt": record.prompt, "image": self.loader.load(record.name, self._image(record), bucket)}
            if record.problem:
                raise ValueError(record.problem)
            return {"prompt": record.prompt}
        except UNREADABLE as error:
            self.unreadable.note(record.name, error)
            return None

    def _image(self, record: Record) -> Path | bytes:
        if record.problem or record.image is None:
            raise ValueError(record.problem or "the item has no image")
        return record.image

    def _check_any(self, unusable: int) -> None:
        # Unreadable records can end one epoch and start the next; with more than these, an epoch has no others.
        if unusable > 2 * self.unreadable.limit:
            raise ValueError(f"no image can be read: {self.unreadable.summary()}. Repair or replace the files")

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
