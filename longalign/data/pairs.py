"""Preference data: pairs of images of one prompt, from a folder or a table."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from longalign.data.base import check_index
from longalign.data.configs import HubPairsConfig, PairsConfig
from longalign.data.hub import caption_from_cell, image_folder, image_source, open_columns
from longalign.data.image_dataset import UNREADABLE, ImageDataset
from longalign.data.lines import inside, read_jsonl, text_of
from longalign.runtime import Runtime

log = logging.getLogger(__name__)

EXAMPLE = '{"image_0": "a.png", "image_1": "b.png", "text": "A red fox.", "label_0": 1, "label_1": 0}'


@dataclass(frozen=True)
class Pair:
    """One preference annotation.

    Attributes:
        prompt: prompt of both images.
        preference: fraction of people who prefer the first image.
        captions: caption of each image, or None.
    """

    prompt: str
    preference: float
    captions: tuple[str, str] | None = None


class Pairs(ImageDataset):
    """Base class of preference data.

    An item is ``{"prompt": str, "image": (2, 3, resolution, resolution) in [0, 1], "preference": ()}``, with
    ``captions``, one text per image, if the pair has captions.

    Args:
        pairs: annotation of each pair.
        resolution: image side in pixels.
        max_unreadable: number of pairs with an unreadable image to replace by the next pair; one more raises.
    """

    def __init__(self, pairs: Sequence[Pair], resolution: int = 224, max_unreadable: int = 10):
        super().__init__(resolution, max_unreadable)
        self.pairs = pairs

    def sources(self, index: int) -> Sequence[Path | bytes]:
        """Paths or encoded bytes of both images of pair ``index`` (non-negative)."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.pairs)

    def prompt(self, index: int) -> str:
        return self.pairs[check_index(index, len(self))].prompt

    def load_item(self, index: int) -> dict[str, Any] | None:
        label = self.label(index)
        if label in self.unreadable:
            return None
        try:
            images = [self.loader.load(label, source) for source in self.sources(index)]
        except UNREADABLE as error:
            self.unreadable.note(label, error)
            return None
        pair = self.pairs[index]
        item = {"prompt": pair.prompt, "image": torch.stack(images), "preference": torch.tensor(pair.preference)}
        return item if pair.captions is None else {**item, "captions": pair.captions}


class FolderPairs(Pairs):
    """Pairs of image files.

    Args:
        folder: folder of the files.
        files: two files per pair, relative to the folder.
        pairs: annotation of each pair.
        resolution: image side in pixels.
        max_unreadable: number of pairs with an unreadable image to replace by the next pair; one more raises.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[tuple[str, str]],
        pairs: Sequence[Pair],
        resolution: int = 224,
        max_unreadable: int = 10,
    ):
        super().__init__(pairs, resolution, max_unreadable)
        self.folder, self.files = folder, files

    @classmethod
    def from_config(cls, config: PairsConfig, runtime: Runtime) -> FolderPairs:
        """Reads ``metadata.jsonl``; images are read on access.

        Raises:
            ValueError: if a line is invalid, only some pairs have captions, or no pair remains.
            FileNotFoundError: if ``metadata.jsonl`` does not exist.
        """
        folder = Path(config.folder)
        files, rows = [], []
        for where, row in read_jsonl(folder / "metadata.jsonl", EXAMPLE):
            names: list[Any] = [row.get(key) for key in ("image_0", "image_1")]
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"{where}: expected files 'image_0' and 'image_1'; available: {', '.join(row)}")
            labels = [row[key] for key in ("label_0", "label_1", "preference") if key in row]
            captions = [row[key] for key in ("caption_0", "caption_1") if key in row]
            for name in names:
                inside(folder, name, where)
            files.append((names[0], names[1]))
            rows.append(_pair(text_of(row, where), labels, captions, where))
        indices, pairs = _select(rows, str(folder))
        return cls(folder, [files[i] for i in indices], pairs, config.resolution, config.max_unreadable)

    def label(self, index: int) -> str:
        return f"the pair {' and '.join(self.files[index])}"

    def sources(self, index: int) -> Sequence[Path]:
        return [inside(self.folder, name) for name in self.files[index]]


class HubPairs(Pairs):
    """Pairs of images in the rows of a table.

    Args:
        rows: table of the library ``datasets``, images undecoded.
        indices: numbers of the rows to use.
        pairs: annotation of each of these rows.
        config: columns to read and image settings.
    """

    def __init__(self, rows: Any, indices: Sequence[int], pairs: Sequence[Pair], config: HubPairsConfig):
        super().__init__(pairs, config.resolution, config.max_unreadable)
        self.rows, self.indices, self.config = rows, indices, config
        self.folder = image_folder(config, rows)

    @classmethod
    def from_config(cls, config: HubPairsConfig, runtime: Runtime) -> HubPairs:
        """Reads the texts and labels of the table; images are read on access.

        Raises:
            ValueError: if a column is missing, a cell is invalid, or no pair remains.
        """
        columns = (config.caption, *config.labels, *config.captions)
        rows = open_columns(config, columns, config.images)
        annotations = []
        for i, row in enumerate(rows.select_columns([*columns])):
            labels, captions = ([row[column] for column in columns] for columns in (config.labels, config.captions))
            where = f"row {i} of {config.dataset}"
            prompt = caption_from_cell(row[config.caption], where)
            annotations.append(_pair(prompt, _flat(labels), _flat(captions), where))
        indices, pairs = _select(annotations, config.dataset)
        return cls(rows.select_columns([*config.images]), indices, pairs, config)

    def label(self, index: int) -> str:
        return f"row {self.indices[index]} of {self.config.dataset}"

    def sources(self, index: int) -> Sequence[Path | bytes]:
        row = self.rows[int(self.indices[index])]
        cells = _flat([row[column] for column in self.config.images])
        if len(cells) != 2:
            raise ValueError(f"expected two images, got {len(cells)}")
        return [image_source(cell, self.folder) for cell in cells]


def _flat(cells: list[Any]) -> list[Any]:
    """Values of two columns, or of one column that holds a list."""
    return list(cells[0]) if len(cells) == 1 and isinstance(cells[0], (list, tuple)) else cells


def _pair(prompt: str, labels: Sequence[Any], captions: Sequence[Any], where: str) -> Pair | str:
    """Pair of a row, or the reason for skipping the row. Raises ValueError if a label is invalid."""
    if not prompt:
        return "an empty prompt"
    if not labels or any(label is None for label in labels):
        return "no label"
    if captions and (len(captions) != 2 or not all(map(caption_from_cell, captions))):
        return "an empty caption"
    both = (caption_from_cell(captions[0]), caption_from_cell(captions[1])) if captions else None
    return Pair(prompt, preference_of(labels, where), both)


def preference_of(labels: Sequence[Any], where: str) -> float:
    """Fraction that prefers the first image, from two labels (1 and 0, or votes) or from the fraction itself.

    Raises:
        ValueError: if the labels are invalid; ``where`` is included in the message.
    """
    numbers = [float(label) for label in labels if isinstance(label, Real)]
    valid = len(numbers) == len(labels) and all(math.isfinite(n) and n >= 0 for n in numbers)
    if valid and len(numbers) == 1 and numbers[0] <= 1:
        return numbers[0]
    if valid and len(numbers) == 2 and sum(numbers):
        return numbers[0] / sum(numbers)
    raise ValueError(
        f"{where}: expected labels of both images, such as 1 and 0, or the fraction that prefers the first; got "
        f"{list(labels)!r:.80}"
    )


def _select(rows: Sequence[Pair | str], where: str) -> tuple[list[int], list[Pair]]:
    """Indices and pairs of the valid rows; a warning counts the skipped ones by reason."""
    indices = [i for i, row in enumerate(rows) if isinstance(row, Pair)]
    pairs = [row for row in rows if isinstance(row, Pair)]
    reasons = Counter(row for row in rows if isinstance(row, str))
    skipped = ", ".join(f"{count} with {reason}" for reason, count in reasons.items())
    if reasons:
        log.warning("skipped of %d pairs in %s: %s", len(rows), where, skipped)
    if not pairs:
        raise ValueError(f"{where} has no usable pairs{f', only {skipped}' if skipped else ''}")
    captioned = sum(pair.captions is not None for pair in pairs)
    if captioned not in (0, len(pairs)):
        raise ValueError(f"{where} has captions for {captioned} of {len(pairs)} pairs; expected all or none")
    return indices, pairs
