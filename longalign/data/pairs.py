"""Pairs of images of one prompt, with which of the two is preferred: from a folder, or from a table."""

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
from longalign.data.hub import caption_from_cell, folder_of, image_source, open_columns
from longalign.data.image_dataset import UNREADABLE, ImageDataset
from longalign.data.lines import inside, read_jsonl, text_of
from longalign.runtime import Runtime

log = logging.getLogger(__name__)

EXAMPLE = '{"image_0": "a.png", "image_1": "b.png", "text": "A red fox.", "label_0": 1, "label_1": 0}'


@dataclass(frozen=True)
class Pair:
    """What is said of two images.

    Attributes:
        prompt: what both are to show.
        preference: share of people who prefer the first.
        captions: what each shows, or None.
    """

    prompt: str
    preference: float
    captions: tuple[str, str] | None = None


class Pairs(ImageDataset):
    """Base of data whose items are ``{"prompt": str, "image": (2, 3, resolution, resolution) in [0, 1], "preference":
    ()}``, with ``captions``, a text for each image, where there are some.

    Args:
        pairs: what is said of each pair.
        resolution: side of the images in pixels.
        max_unreadable: how many pairs are replaced by the next one before the run is stopped, for an image of theirs
            cannot be read.
    """

    def __init__(self, pairs: Sequence[Pair], resolution: int = 224, max_unreadable: int = 10):
        super().__init__(resolution, max_unreadable)
        self.pairs = pairs

    def sources(self, index: int) -> Sequence[Path | bytes]:
        """Where both images of pair ``index`` (not negative) are."""
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
            images = [self.squares.load(label, source) for source in self.sources(index)]
        except UNREADABLE as error:
            self.unreadable.note(label, error)
            return None
        pair = self.pairs[index]
        item = {"prompt": pair.prompt, "image": torch.stack(images), "preference": torch.tensor(pair.preference)}
        return item if pair.captions is None else {**item, "captions": pair.captions}


class FolderPairs(Pairs):
    """Pairs of image files.

    Args:
        folder: where the files are.
        files: two for each pair, relative to the folder.
        pairs: what is said of each pair.
        resolution: side of the images in pixels.
        max_unreadable: how many pairs are replaced by the next one before the run is stopped.
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
        """Reads ``metadata.jsonl``; images are read when asked for.

        Raises:
            ValueError: if a line lacks something, only some have captions, or no pair is left.
            FileNotFoundError: if there is no ``metadata.jsonl``.
        """
        folder = Path(config.folder)
        files, found = [], []
        for where, row in read_jsonl(folder / "metadata.jsonl", EXAMPLE):
            names: list[Any] = [row.get(key) for key in ("image_0", "image_1")]
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"{where}: expected files 'image_0' and 'image_1'; there is {', '.join(row)}")
            labels = [row[key] for key in ("label_0", "label_1", "preference") if key in row]
            captions = [row[key] for key in ("caption_0", "caption_1") if key in row]
            for name in names:
                inside(folder, name, where)
            files.append((names[0], names[1]))
            found.append(_pair(text_of(row, where), labels, captions, where))
        kept, pairs = _kept(found, str(folder))
        return cls(folder, [files[i] for i in kept], pairs, config.resolution, config.max_unreadable)

    def label(self, index: int) -> str:
        return f"the pair {' and '.join(self.files[index])}"

    def sources(self, index: int) -> Sequence[Path]:
        return [inside(self.folder, name) for name in self.files[index]]


class HubPairs(Pairs):
    """Pairs of images in the rows of a table.

    Args:
        rows: of the library ``datasets``, with images undecoded.
        kept: numbers of the rows to use.
        pairs: what is said of each of them.
        config: says which columns to read, and how.
    """

    def __init__(self, rows: Any, kept: Sequence[int], pairs: Sequence[Pair], config: HubPairsConfig):
        super().__init__(pairs, config.resolution, config.max_unreadable)
        self.rows, self.kept, self.config = rows, kept, config
        self.folder = folder_of(config, rows)

    @classmethod
    def from_config(cls, config: HubPairsConfig, runtime: Runtime) -> HubPairs:
        """Reads the texts and labels of the table; images are read when asked for.

        Raises:
            ValueError: if a column is missing, a cell holds something else, or no pair is left.
        """
        columns = (config.caption, *config.labels, *config.captions)
        rows = open_columns(config, columns, config.images)
        found = []
        for i, row in enumerate(rows.select_columns([*columns])):
            labels, captions = ([row[column] for column in columns] for columns in (config.labels, config.captions))
            where = f"row {i} of {config.dataset}"
            found.append(_pair(caption_from_cell(row[config.caption], where), _flat(labels), _flat(captions), where))
        kept, pairs = _kept(found, config.dataset)
        return cls(rows.select_columns([*config.images]), kept, pairs, config)

    def label(self, index: int) -> str:
        return f"row {self.kept[index]} of {self.config.dataset}"

    def sources(self, index: int) -> Sequence[Path | bytes]:
        row = self.rows[int(self.kept[index])]
        cells = _flat([row[column] for column in self.config.images])
        if len(cells) != 2:
            raise ValueError(f"expected two images, got {len(cells)}")
        return [image_source(cell, self.folder) for cell in cells]


def _flat(cells: list[Any]) -> list[Any]:
    """The values of two columns, or of the list that is in one."""
    return list(cells[0]) if len(cells) == 1 and isinstance(cells[0], (list, tuple)) else cells


def _pair(prompt: str, labels: Sequence[Any], captions: Sequence[Any], where: str) -> Pair | str:
    """The pair of a row, or what it lacks. Raises ValueError if a label is no label."""
    if not prompt:
        return "an empty prompt"
    if not labels or any(label is None for label in labels):
        return "no label"
    if captions and (len(captions) != 2 or not all(map(caption_from_cell, captions))):
        return "an empty caption"
    both = (caption_from_cell(captions[0]), caption_from_cell(captions[1])) if captions else None
    return Pair(prompt, preference_of(labels, where), both)


def preference_of(labels: Sequence[Any], where: str) -> float:
    """The share that prefers the first image, from two labels, which may be votes, or from that share itself.

    Raises:
        ValueError: if the labels are none, with ``where`` they are.
    """
    numbers = [float(label) for label in labels if isinstance(label, Real)]
    good = len(numbers) == len(labels) and all(math.isfinite(n) and n >= 0 for n in numbers)
    if good and len(numbers) == 1 and numbers[0] <= 1:
        return numbers[0]
    if good and len(numbers) == 2 and sum(numbers):
        return numbers[0] / sum(numbers)
    raise ValueError(
        f"{where}: expected labels of both images, such as 1 and 0, or the share that prefers the first; got "
        f"{list(labels)!r:.80}"
    )


def _kept(found: Sequence[Pair | str], where: str) -> tuple[list[int], list[Pair]]:
    """Numbers of the rows that are pairs, and these; what is left out is counted in a warning."""
    kept = [(i, pair) for i, pair in enumerate(found) if isinstance(pair, Pair)]
    lacking = Counter(what for what in found if isinstance(what, str))
    skipped = ", ".join(f"{count} with {what}" for what, count in lacking.items())
    if lacking:
        log.warning("left out of %d pairs in %s: %s", len(found), where, skipped)
    if not kept:
        raise ValueError(f"{where} holds no pairs{f', only {skipped}' if skipped else ''}")
    with_captions = sum(pair.captions is not None for _, pair in kept)
    if with_captions not in (0, len(kept)):
        raise ValueError(
            f"{where} has captions for {with_captions} of {len(kept)} pairs; expected them for all or none"
        )
    return [i for i, _ in kept], [pair for _, pair in kept]
