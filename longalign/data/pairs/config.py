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
    """Base class of configs of stored preference data: pairs of images of one prompt, with a preference."""

    has_pairs: ClassVar[bool] = True

    resolution: PositiveInt = 224
    """width and height in pixels to which images are resized and centre-cropped."""
    max_unreadable: NonNegativeInt = 10
    """number of pairs with an unreadable image that are tolerated. Each is replaced by the next pair, with a warning;
    one more stops the run. Each data loading process counts its own.
    """

    @property
    def image_sizes(self) -> Mapping[str, Sequence[Size]]:
        return {"resolution": [parse_size(self.resolution)]}


class PairsConfig(PairedImagesConfig):
    """Preference data in a folder: pairs of images with a prompt and a preference."""

    target: ClassVar[str] = "longalign.data.pairs.folder:FolderPairs"

    name: Literal["pairs"] = "pairs"
    folder: Text
    """folder with a ``metadata.jsonl``. Each line is a pair: the files "image_0" and "image_1", the prompt "text" (or
    "prompt"), and either "label_0" and "label_1" or "preference". The labels are 1 and 0, fractions or votes for each
    image; equal labels are a tie. "preference" is the fraction of people who prefer "image_0". Optional: a caption of
    each image, "caption_0" and "caption_1". Pairs without a label are skipped, with a warning.
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
    """names of two columns with one image each, or of one column with a list of two images. An image is encoded bytes
    or a path.
    """
    labels: Annotated[Texts, Field(min_length=1, max_length=2)] = ("label_0", "label_1")
    """names of two columns with one label each, of one column with a list of two labels, or of one column with the
    fraction of people who prefer the first image. Two labels are 1 and 0, fractions or votes for each image; equal
    labels are a tie. Pairs without a label are skipped, with a warning.
    """
    captions: Annotated[Texts, Field(max_length=2)] = ()
    """names of two columns with the caption of one image each, or of one column with a list of two captions; empty: no
    captions. A caption describes one image; the prompt is in the column ``caption``.
    """
