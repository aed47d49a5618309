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
    ``longalign generate`` writes it; a ``metadata.csv`` has these columns. Without either, the caption of an image is
    in a .txt of the same name next to the image, also in subfolders. File names are relative to the folder and must
    stay inside this folder; symbolic links are followed.
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

    Files with the same stem form one item; files larger than 256 MiB are not read.
    """

    target: ClassVar[str] = "longalign.data.images.webdataset:WebDataset"

    name: Literal["webdataset"] = "webdataset"
    shards: Annotated[Texts, Field(min_length=1)]
    """path or list of paths of tar files, with ``{0000..0123}`` for a range or ``*``."""
    image: Annotated[Texts, Field(min_length=1)] = ("jpg", "jpeg", "png", "webp")
    """image suffixes in order of preference."""
    caption: Text = "txt"
    """suffix of the caption file: "txt", or "json" with a ``field``."""
    field: Text | None = None
    """key of the caption in a JSON file; null: "caption"."""
    shuffle_buffer: PositiveInt = 1000
    """number of items in the shuffle buffer; 1 keeps the order."""

    def check_files(self) -> list[ConfigProblem]:
        return [("shards", problem) for pattern in self.shards if (problem := shard_problem(pattern))]

    @property
    def is_stream(self) -> bool:
        return True

    @property
    def caption_field(self) -> str | None:
        """Key of the caption in a JSON file; None for a text file."""
        return (self.field or "caption") if self.caption.endswith("json") else None

    @model_validator(mode="after")
    def _check_keys(self) -> WebDatasetConfig:
        if self.field is not None and self.caption_field is None:
            raise ValueError(f"'field' is a key of JSON files, but '{self.caption}' is read as text; remove it")
        return self


class LongAlignCaptionsConfig(ImagesConfig):
    """The public LongAlign captions (2.27 million rows ``caption, path, source``) with local images."""

    target: ClassVar[str] = "longalign.data.images.captions:LongAlignCaptions"

    name: Literal["longalign-captions"] = "longalign-captions"
    folders: Annotated[dict[str, Text], Field(min_length=1)]
    """image folder of each source, by the names in the column ``source``; ``path`` is relative to it. Rows of other
    sources are skipped.
    """
    captions: Text = "luping-liu/LongAlign"
    """Hub id, a local .parquet, .csv or .jsonl file, or a folder of such files of one format."""
    split: Text = "train"
    """split to load."""
    revision: Text | None = None
    """branch, tag or commit on the Hub."""
    cache: Text | None = None
    """cache folder of the library ``datasets``; null: the default of ``datasets``."""
    max_missing: NonNegativeInt | None = None
    """number of image files that may be missing; null: any number. Missing files are skipped at the start, with a
    warning.
    """

    def check_files(self) -> list[ConfigProblem]:
        return [
            problem for key, folder in self.folders.items() for problem in folder_problems(f"folders.{key}", folder)
        ]
