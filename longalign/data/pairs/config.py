"""Configs of stored preference data. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from longalign.data.config import DataConfig, Text, Texts, folder_problems
from longalign.data.tables.config import TableConfig
from longalign.errors import ConfigProblem
from longalign.sizes import Size, parse_size


class PairedImagesConfig(DataConfig):
    """Base class of configs of stored preference data."""

    has_pairs: ClassVar[bool] = True

    resolution: PositiveInt = 224
    """centre-crop and resize images to this many pixels."""
    max_unreadable: NonNegativeInt = 10
    """number of pairs with an unreadable image to replace by the next pair, each with a warning; one more stops the
    run. Each data loading process counts its own.
    """

    @property
    def image_sizes(self) -> Mapping[str, Sequence[Size]]:
        return {"resolution": [parse_size(self.resolution)]}


class PairsConfig(PairedImagesConfig):
    """Preference data in a folder: pairs of images with a prompt and a preference."""

    target: ClassVar[str] = "longalign.data.pairs.folder:FolderPairs"

    name: Literal["pairs"] = "pairs"
    folder: Text
    """folder with ``metadata.jsonl``, one line per pair: files "image_0" and "image_1", "text" (or "prompt"), and the
    preference. This is "label_0" and "label_1" (1 and 0, fractions or votes; equal is a tie), or "preference", the
    fraction that prefers the first image. Optional: a caption of each image, "caption_0" and "caption_1". Pairs without
    a label are skipped.
    """

    def check_files(self) -> list[ConfigProblem]:
        path = Path(self.folder) / "metadata.jsonl"
        message = f'no file {path}; expected one JSON mapping per line with "image_0", "image_1", "text"'
        return folder_problems("folder", self.folder) or ([] if path.is_file() else [("folder", message)])


class HubPairsConfig(TableConfig, PairedImagesConfig):
    """Preference data of a table read with the library ``datasets``.

    The defaults are the columns of Pick-a-Pic (``yuvalkirstain/pickapic_v1``). For HPD v2, set ``images: image_path``,
    ``labels: human_preference`` and ``caption: prompt``.
    """

    target: ClassVar[str] = "longalign.data.pairs.table:HubPairs"

    name: Literal["hf-pairs"] = "hf-pairs"
    images: Annotated[Texts, Field(min_length=1, max_length=2)] = ("jpg_0", "jpg_1")
    """two columns of images, encoded bytes or paths, or one column with a list of two."""
    labels: Annotated[Texts, Field(min_length=1, max_length=2)] = ("label_0", "label_1")
    """two columns of numbers, one column with a list of two, or one column with the fraction that prefers the first
    image. Two numbers are 1 and 0, fractions or votes; equal values mean a tie. Pairs without a label are skipped.
    """
    captions: Annotated[Texts, Field(max_length=2)] = ()
    """two columns with a caption of each image, or one column with a list of two; empty: no captions."""
