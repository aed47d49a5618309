"""Base class of preference data, and the annotation of a pair."""

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
from longalign.data.images.base import UNREADABLE, ImageDataset
from longalign.data.tables.table import caption_from_cell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """The annotation of a pair of images: the prompt and the preference.

    Attributes:
        prompt: prompt of both images, not empty.
        preference: fraction of people who prefer the first image, from 0 to 1.
        captions: caption of each image; None if there are no captions.
    """

    prompt: str
    preference: float
    captions: tuple[str, str] | None = None


class Pairs(ImageDataset):
    """Base class of stored preference data: pairs of images of one prompt. Subclasses implement `sources` and `label`.

    An item has ``"prompt"`` (str), ``"image"`` (float32 ``(2, 3, resolution, resolution)`` in [0, 1]), and
    ``"preference"`` (float32 scalar): the fraction of people, from 0 to 1, who prefer the first image. If the pair has
    captions, the item also has ``"captions"``, a text for each image.

    Args:
        pairs: annotation of each pair.
        resolution: width and height of the images in pixels.
        max_unreadable: number of pairs with an unreadable image to replace by the next pair; one more raises an error.
    """

    def __init__(self, pairs: Sequence[Pair], *, resolution: int, max_unreadable: int):
        super().__init__(resolution=resolution, max_unreadable=max_unreadable)
        self.pairs = pairs

    def sources(self, index: int) -> Sequence[Path | bytes]:
        """Returns the paths of the two image files of pair ``index`` (non-negative), or the bytes of such files."""
        raise NotImplementedError(f"{type(self).__name__} has no method sources; implement it")

    def __len__(self) -> int:
        return len(self.pairs)

    def prompt(self, index: int) -> str:
        return self.pairs[check_index(index, len(self))].prompt

    def load_item(self, index: int, bucket: int | None = None) -> dict[str, Any] | None:
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


def read_pair(prompt: str, labels: Sequence[Any], captions: Sequence[Any], where: str) -> Pair | str:
    """Returns the annotation in a row, or the reason for skipping the row, as text.

    A row is skipped if the prompt or a caption is empty, or a label is missing.

    Args:
        prompt: prompt of both images.
        labels: labels as for `preference_of`; empty, or with None, if a label is missing.
        captions: a caption of each image; empty for no captions.
        where: location of the row in error messages.

    Raises:
        ValueError: if a label is invalid.
    """
    if not prompt:
        return "an empty prompt"
    if not labels or any(label is None for label in labels):
        return "no label"
    if captions and (len(captions) != 2 or not all(map(caption_from_cell, captions))):
        return "an empty caption"
    both = (caption_from_cell(captions[0]), caption_from_cell(captions[1])) if captions else None
    return Pair(prompt, preference_of(labels, where), both)


def preference_of(labels: Sequence[Any], where: str) -> float:
    """Returns the fraction of people who prefer the first image.

    Args:
        labels: either one number from 0 to 1, which is returned, or two numbers of at least 0, one for each image, such
            as 1 and 0 or numbers of votes. Of two numbers, the first divided by their sum is returned.
        where: location of the labels in the error message.

    Raises:
        ValueError: if ``labels`` are neither one nor two such numbers, or both are 0.
    """
    numbers = [float(label) for label in labels if isinstance(label, Real)]
    valid = len(numbers) == len(labels) and all(math.isfinite(n) and n >= 0 for n in numbers)
    if valid and len(numbers) == 1 and numbers[0] <= 1:
        return numbers[0]
    if valid and len(numbers) == 2 and sum(numbers):
        return numbers[0] / sum(numbers)
    raise ValueError(
        f"{where}: expected two labels, one per image, such as 1 and 0, or one fraction from 0 to 1 of people who "
        f"prefer the first image; got {list(labels)!r:.80}"
    )


def select_pairs(rows: Sequence[Pair | str], where: str) -> tuple[list[int], list[Pair]]:
    """Returns the indices and the annotations of the valid rows; a warning counts the skipped rows by reason.

    Args:
        rows: results of `read_pair`: an annotation, or the reason for skipping the row.
        where: name of the data in messages.

    Raises:
        ValueError: if no row is valid, or only some of the valid rows have captions.
    """
    indices = [i for i, row in enumerate(rows) if isinstance(row, Pair)]
    pairs = [row for row in rows if isinstance(row, Pair)]
    reasons = Counter(row for row in rows if isinstance(row, str))
    skipped = ", ".join(f"{count} with {reason}" for reason, count in reasons.items())
    if reasons:
        log.warning("of %d pairs in %s, skipped: %s", len(rows), where, skipped)
    if not pairs:
        raise ValueError(
            f"{where} has no usable pairs{f', only {skipped}' if skipped else ''}; expected at least one pair with a "
            "prompt and a label"
        )
    captioned = sum(pair.captions is not None for pair in pairs)
    if captioned not in (0, len(pairs)):
        raise ValueError(
            f"{where} has captions for {captioned} of {len(pairs)} pairs; expected all or none. Add the missing "
            "captions, or remove all"
        )
    return indices, pairs
