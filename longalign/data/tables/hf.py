"""The data part ``hf``: a table read by index or as a stream, with or without images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longalign.data.base import check_index
from longalign.data.images.base import ImageDataset, Resolution
from longalign.data.prompts.prompts import Prompts
from longalign.data.stream import Record, Stream
from longalign.data.tables.config import HubConfig
from longalign.data.tables.table import caption_from_cell, image_folder, image_source, open_columns
from longalign.runtime import Runtime


class HubTable:
    """Builds the data of a `HubConfig` with `from_config`; has no instances."""

    @classmethod
    def from_config(cls, config: HubConfig, runtime: Runtime) -> HubRows | Prompts | HubStream:
        """Opens the table: as a `HubStream` with ``config.streaming``.

        Otherwise it is opened as `Prompts` if ``config.image`` is None, and as `HubRows` if it is a column.

        Raises:
            ValueError: if ``datasets`` is not installed or cannot read the table, a column is missing, or no caption
                remains.
        """
        rows = open_columns(config, [config.caption], [] if config.image is None else [config.image])
        if config.streaming:
            return HubStream(
                rows,
                dataset=config.dataset,
                caption=config.caption,
                image=config.image,
                folder=image_folder(config, rows),
                resolution=config.sizes,
                empty=config.empty,
                max_unreadable=config.max_unreadable,
                shuffle_buffer=config.shuffle_buffer or 1000,
            )
        captions = Captions(rows[config.caption], dataset=config.dataset, column=config.caption, empty=config.empty)
        if config.image is None:
            return Prompts(captions)
        return HubRows(
            rows,
            captions=captions,
            image=config.image,
            folder=image_folder(config, rows),
            resolution=config.sizes,
            max_unreadable=config.max_unreadable,
        )


class Captions(Sequence[str]):
    """Sequence of the captions in a column of a table, without surrounding whitespace.

    Args:
        cells: the cells of the column, each a string or None.
        dataset: name of the table in messages.
        column: name of the column in messages.
        empty: "skip" or "keep": what to do with rows with an empty caption.

    Attributes:
        indices: number of the row of each caption, from 0.

    Raises:
        ValueError: if no caption remains, or a cell is neither a string nor None. With "keep", cells are checked when
            they are read.
    """

    def __init__(self, cells: Sequence[Any], *, dataset: str, column: str, empty: str):
        indices = range(len(cells))
        if empty == "skip":
            indices = [i for i, cell in enumerate(cells) if caption_from_cell(cell, f"row {i} of {dataset}")]
        if not indices:
            raise ValueError(
                f"'{dataset}' has no captions in the column '{column}'; set `caption` to the column of the captions"
            )
        self.cells, self.indices, self.dataset = cells, indices, dataset

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return caption_from_cell(self.cells[self.indices[check_index(index, len(self))]])

    def row(self, index: int) -> int:
        """Returns the number of the row of the table, counted from 0, that has the caption ``self[index]``."""
        return int(self.indices[index])


class HubRows(ImageDataset):
    """Dataset of the captioned images in the rows of a table, read by index.

    Args:
        rows: table of the library ``datasets``, images undecoded.
        captions: captions of the rows to use.
        image: name of the image column.
        folder: folder that paths in the image column are relative to; None rejects paths.
        resolution: side of square images in pixels, or a list of image sizes; see `ImageLoader`.
        max_unreadable: number of unreadable images to replace by the next readable one; one more raises an error.
    """

    def __init__(
        self,
        rows: Any,
        *,
        captions: Captions,
        image: str,
        folder: Path | None,
        resolution: Resolution,
        max_unreadable: int,
    ):
        super().__init__(resolution=resolution, max_unreadable=max_unreadable)
        self.rows, self.captions, self.image, self.folder = rows, captions, image, folder

    def __len__(self) -> int:
        return len(self.captions)

    def prompt(self, index: int) -> str:
        return self.captions[index]

    def label(self, index: int) -> str:
        return f"row {self.captions.row(index)} of {self.captions.dataset}"

    def source(self, index: int) -> Path | bytes:
        return image_source(self.rows[self.captions.row(index)][self.image], self.folder)


class HubStream(Stream):
    """Stream of captioned images or prompts in the rows of a table, which is not downloaded first.

    Args:
        rows: streaming dataset of the library ``datasets``.
        dataset: name of the table in messages.
        caption: name of the caption column.
        image: name of the image column; None for prompts only.
        folder: folder that paths in the image column are relative to; None rejects paths.
        resolution: see `Stream`.
        empty: see `Stream`.
        max_unreadable: see `Stream`.
        shuffle_buffer: see `Stream`.
    """

    def __init__(
        self,
        rows: Any,
        *,
        dataset: str,
        caption: str,
        image: str | None,
        folder: Path | None,
        resolution: Resolution,
        empty: str,
        max_unreadable: int,
        shuffle_buffer: int,
    ):
        self.has_images = image is not None
        super().__init__(
            resolution=resolution, empty=empty, max_unreadable=max_unreadable, shuffle_buffer=shuffle_buffer
        )
        self.rows, self.dataset, self.caption, self.image, self.folder = rows, dataset, caption, image, folder

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def read(self, shard: int) -> Iterator[Record]:
        where = f"shard {shard} of {self.dataset}"
        try:
            for number, row in enumerate(self.rows.shard(num_shards=self.num_shards, index=shard)):
                yield self._record(f"row {number} of {where}", row)
        except Exception as error:  # each format raises different errors for damaged files
            self.unreadable.note(f"the rest of {where}", error)

    def _record(self, name: str, row: Any) -> Record:
        try:
            image = None if self.image is None else image_source(row[self.image], self.folder)
            return Record(name, caption_from_cell(row[self.caption]), image)
        except ValueError as error:
            return Record(name, problem=str(error))
