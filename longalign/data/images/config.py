"""Configs of stored images. Importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from longalign.data.config import ImagesConfig, Text, Texts, folder_problems
from longalign.data.images.shards import shard_problem
from longalign.errors import ConfigProblem


class FolderConfig(ImagesConfig):
    """Captioned images in a folder."""

    target: ClassVar[str] = "longalign.data.images.folder:Folder"

    name: Literal["folder"] = "folder"
    folder: Text
    """folder of the images. Its ``metadata.jsonl`` has one line per image with "file_name" and "text" (or "prompt"), as
    ``longalign generate`` writes it; a ``metadata.csv`` has columns of these names. Without such a file, the caption of
    each image, also in subfolders, is in a .txt file of the same name next to the image. File names are relative to the
    folder and must stay inside this folder; symbolic links are followed.
    """

    def check_files(self) -> list[ConfigProblem]:
        folder = Path(self.folder)
        indexed = any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv"))
        if indexed or next(folder.rglob("*.txt"), None) is not None:
            return []
        message = f"{folder} has neither metadata.jsonl nor metadata.csv nor .txt files of captions; add one of them"
        return folder_problems("folder", self.folder) or [("folder", message)]


class WebDatasetConfig(ImagesConfig):
    """Local tar files in WebDataset layout, read as a stream.

    Files of the same folder and stem (name up to the first dot) form one item. An item with an image or caption file
    larger than 256 MiB counts as unreadable.
    """

    target: ClassVar[str] = "longalign.data.images.webdataset:WebDataset"

    name: Literal["webdataset"] = "webdataset"
    shards: Annotated[Texts, Field(min_length=1)]
    """path or list of paths of tar files; ``{0000..0123}`` stands for a range of numbers, ``*`` for any text."""
    image: Annotated[Texts, Field(min_length=1)] = ("jpg", "jpeg", "png", "webp")
    """suffixes of the image file, without dot. If an item has several such files, the first of these suffixes is used.
    """
    caption: Text = "txt"
    """suffix of the caption file, without dot. A suffix that ends in "json" means JSON with the key ``field``; any
    other suffix means text.
    """
    field: Text | None = None
    """key of the caption in a JSON file; null: "caption". Not allowed for a text file."""
    shuffle_buffer: PositiveInt = 1000
    """number of items in the shuffle buffer of each data loading worker; 1 keeps the order of the items."""

    def check_files(self) -> list[ConfigProblem]:
        return [("shards", problem) for pattern in self.shards if (problem := shard_problem(pattern))]

    @property
    def is_stream(self) -> bool:
        return True

    @property
    def caption_field(self) -> str | None:
        """Key of the caption in the JSON caption files; None if the caption files are text."""
        return (self.field or "caption") if self.caption.endswith("json") else None

    @model_validator(mode="after")
    def _check_keys(self) -> WebDatasetConfig:
        if self.field is not None and self.caption_field is None:
            raise ValueError(
                f"'field' is a key of JSON files, but '{self.caption}' files are read as text; remove 'field'"
            )
        return self


class LongAlignCaptionsConfig(ImagesConfig):
    """The public LongAlign captions (2.27 million rows ``caption, path, source``) with local images."""

    target: ClassVar[str] = "longalign.data.images.captions:LongAlignCaptions"

    name: Literal["longalign-captions"] = "longalign-captions"
    folders: Annotated[dict[str, Text], Field(min_length=1)]
    """mapping from a value of the column ``source`` to an image folder, which the paths in the column ``path`` are
    relative to. Rows of other sources are skipped.
    """
    captions: Text = "luping-liu/LongAlign"
    """Hub id, a local .parquet, .csv or .jsonl file, or a folder of such files of one format."""
    split: Text = "train"
    """name of the split to load."""
    revision: Text | None = None
    """branch, tag or commit on the Hub; null: the default branch."""
    cache: Text | None = None
    """cache folder of the library ``datasets``; null: the default of ``datasets``."""
    max_missing: NonNegativeInt | None = None
    """number of image files that may be missing; null: any number. Rows without an image file are skipped at the start,
    with a warning; one more than this number is an error.
    """

    def check_files(self) -> list[ConfigProblem]:
        return [
            problem for key, folder in self.folders.items() for problem in folder_problems(f"folders.{key}", folder)
        ]
