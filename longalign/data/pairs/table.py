"""Preference data in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign.data.pairs.base import Pair, Pairs, read_pair, select_pairs
from longalign.data.pairs.config import HubPairsConfig
from longalign.data.tables.table import caption_from_cell, image_folder, image_source, open_columns
from longalign.runtime import Runtime


class HubPairs(Pairs):
    """Preference data in a table; each row is a pair.

    Args:
        rows: table of the library ``datasets``, images undecoded.
        dataset: name of the table in messages.
        images: names of two columns with one image each, or of one column with a list of two images.
        indices: number of the row of each pair, from 0.
        pairs: annotation of each pair.
        folder: folder that paths in the image columns are relative to; None rejects paths.
        resolution: width and height of the images in pixels.
        max_unreadable: number of pairs with an unreadable image to replace by the next pair; one more raises an error.
    """

    def __init__(
        self,
        rows: Any,
        *,
        dataset: str,
        images: Sequence[str],
        indices: Sequence[int],
        pairs: Sequence[Pair],
        folder: Path | None,
        resolution: int,
        max_unreadable: int,
    ):
        super().__init__(pairs, resolution=resolution, max_unreadable=max_unreadable)
        self.rows, self.dataset, self.images, self.indices, self.folder = rows, dataset, images, indices, folder

    @classmethod
    def from_config(cls, config: HubPairsConfig, runtime: Runtime) -> HubPairs:
        """Reads the texts and labels of the table; images are read when an item is accessed.

        Raises:
            ValueError: if a column is missing, a cell is invalid, only some pairs have captions, or no pair has a
                prompt and a label.
        """
        columns = (config.caption, *config.labels, *config.captions)
        rows = open_columns(config, columns, config.images)
        annotations = []
        for i, row in enumerate(rows.select_columns([*columns])):
            labels, captions = ([row[column] for column in columns] for columns in (config.labels, config.captions))
            where = f"row {i} of {config.dataset}"
            prompt = caption_from_cell(row[config.caption], where)
            annotations.append(read_pair(prompt, flat_cells(labels), flat_cells(captions), where))
        indices, pairs = select_pairs(annotations, config.dataset)
        return cls(
            rows.select_columns([*config.images]),
            dataset=config.dataset,
            images=config.images,
            indices=indices,
            pairs=pairs,
            folder=image_folder(config, rows),
            resolution=config.resolution,
            max_unreadable=config.max_unreadable,
        )

    def label(self, index: int) -> str:
        return f"row {self.indices[index]} of {self.dataset}"

    def sources(self, index: int) -> Sequence[Path | bytes]:
        row = self.rows[int(self.indices[index])]
        cells = flat_cells([row[column] for column in self.images])
        if len(cells) != 2:
            raise ValueError(f"expected two images in the row, got {len(cells)}; correct the columns of 'images'")
        return [image_source(cell, self.folder) for cell in cells]


def flat_cells(cells: list[Any]) -> list[Any]:
    """Returns the given cells of a row; if there is only one and it is a list, returns its elements."""
    return list(cells[0]) if len(cells) == 1 and isinstance(cells[0], (list, tuple)) else cells
