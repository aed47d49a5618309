"""The interface of data that is read in its order, shard by shard, and not by index."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.data.image_dataset import UNREADABLE, Squares, Unreadable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """An item as it is stored.

    Attributes:
        name: what it is called in messages.
        prompt: its caption.
        image: its encoded image, or where that is; None where there are prompts alone.
        fault: what is wrong with it, or an empty text.
    """

    name: str
    prompt: str = ""
    image: Path | bytes | None = None
    problem: str = ""


class Stream:
    """Base of data in shards, endless: pass after pass, in another order each.

    The shards are dealt to processes and their workers; where there are fewer shards, each reads all and takes its
    share of the records. Within a share the order of the shards is shuffled, and records in a buffer. All of it follows
    from the seed, the number of processes and that of workers, so a resumed run goes on where it was. Shares whose
    shards hold fewer records come round sooner.

    Args:
        resolution: side of the images in pixels.
        empty: whether an empty caption is to ``"skip"`` or to ``"keep"``.
        max_unreadable: how many unreadable images are replaced by the next readable one before the run is stopped.
        shuffle_buffer: records among which the next one is drawn; 1 keeps the order.
    """

    has_images: bool = True

    def __init__(
        self, resolution: int | None = 512, empty: str = "skip", max_unreadable: int = 10, shuffle_buffer: int = 1000
    ):
        self.squares = Squares(resolution) if self.has_images else None
        self.empty, self.shuffle_buffer = empty, shuffle_buffer
        self.unreadable = Unreadable(max_unreadable)
        self._warned_empty = False

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        raise NotImplementedError

    def read(self, shard: int) -> Iterator[Record]:
        """The records of a shard, in order."""
        raise NotImplementedError

    def items(
        self, seed: int, share: int = 0, shares: int = 1, skip: int = 0, images: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Endless items ``{"prompt": str, "image": (3, resolution, resolution) in [0, 1]}``.

        Args:
            seed: of the shuffles.
            share: which part of the data, of ``shares`` that together have all of it.
            shares: number of parts.
            skip: items to leave out at the start, without decoding them.
            images: whether items have their image.

        Raises:
            ValueError: if too many images cannot be read, or there is nothing to read.
        """
        # An unreadable image leaves its place to the next readable one, so that places can be counted undecoded.
        places = 0
        for number, record in enumerate(self._records(seed, share, shares)):
            if number < skip:
                continue
            places += 1
            item: dict[str, Any] = {"prompt": record.prompt}
            try:
                if record.name in self.unreadable:
                    raise ValueError(self.unreadable[record.name])
                if record.problem:
                    raise ValueError(record.problem)
                if images:
                    if record.image is None or self.squares is None:
                        raise ValueError("it has no image")
                    item["image"] = self.squares.load(record.name, record.image)
            except UNREADABLE as error:
                self.unreadable.note(record.name, error)
                # no more than the limit can end a pass and begin the next one, so there is a pass with nothing else
                if places > 2 * self.unreadable.limit:
                    raise ValueError(f"no image can be read: {self.unreadable.named()}") from error
                continue
            for _ in range(places):
                yield item
            places = 0

    def _records(self, seed: int, share: int, shares: int) -> Iterator[Record]:
        number_of_pass = 0
        while True:
            rng = random.Random(f"{seed} {share} {shares} {number_of_pass}")
            some = False
            for record in self._shuffled(self._in_order(rng, share, shares), rng):
                some = True
                yield record
            if not some:
                cause = f"; {self.unreadable.named()}" if self.unreadable else ""
                raise ValueError(
                    f"there is nothing to read in part {share} of {shares} of the data: no item with a caption{cause}"
                )
            number_of_pass += 1

    def _in_order(self, rng: random.Random, share: int, shares: int) -> Iterator[Record]:
        dealt = self.num_shards >= shares
        shards = list(range(self.num_shards))[share::shares] if dealt else list(range(self.num_shards))
        rng.shuffle(shards)
        for shard in shards:
            for number, record in enumerate(self.read(shard)):
                if not dealt and number % shares != share:
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
            at = rng.randrange(len(buffer))
            buffer[at], record = record, buffer[at]
            yield record
        rng.shuffle(buffer)
        yield from buffer
