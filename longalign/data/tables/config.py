"""Configs of tables. Importing this module does not import torch."""

from __future__ import annotations

from glob import glob
from typing import ClassVar, Literal

from pydantic import PositiveInt, model_validator

from longalign.data.config import DataConfig, ImagesConfig, Text, Texts, folder_problems
from longalign.errors import ConfigProblem, redact_url


class TableConfig(DataConfig):
    """Base class of configs of tables read with the library ``datasets``.

    A table is a Hub dataset, parquet files, or any format that the library supports.
    """

    dataset: Text
    """Hub id, local folder, or the name of a format of ``files``, such as "parquet", "json" or "webdataset"."""
    subset: Text | None = None
    """name of a configuration of the dataset; null: its default configuration."""
    split: Text = "train"
    """name of the split to load."""
    revision: Text | None = None
    """branch, tag or commit on the Hub; null: the default branch."""
    files: Texts = ()
    """path or URL of the files to read, or a list of these; ``*`` stands for any text. Empty: the files of ``dataset``.
    """
    caption: Text = "caption"
    """name of the column of captions or prompts."""
    image_folder: Text | None = None
    """folder that paths in the image column are relative to. Paths must stay inside this folder; ``/`` allows any
    absolute path. null: the column must hold images or encoded bytes instead of paths.
    """
    cache: Text | None = None
    """cache folder of the library ``datasets``; null: the default of ``datasets``."""

    def check_files(self) -> list[ConfigProblem]:
        problems = folder_problems("image_folder", self.image_folder)
        missing = [f for f in self.files if "://" not in f and not glob(f, recursive=True)]
        return problems + [("files", f"no file {redact_url(f)}") for f in missing]


class HubConfig(TableConfig, ImagesConfig):
    """A table read with the library ``datasets``: a Hub dataset, parquet files, or any format it supports."""

    target: ClassVar[str] = "longalign.data.tables.hf:HubTable"

    name: Literal["hf"] = "hf"
    image: Text | None = "image"
    """name of the column of images, encoded bytes or paths; null: read only captions, for reward fine-tuning."""
    streaming: bool = False
    """whether to read the files of the dataset (shards) during training, instead of downloading all of them first.
    Shards are distributed over processes and their data loading workers.
    """
    shuffle_buffer: PositiveInt | None = None
    """number of rows in the shuffle buffer of each data loading worker, only with ``streaming``; 1 keeps the order of
    the rows; null: 1000.
    """

    @property
    def has_images(self) -> bool:
        return self.image is not None

    @property
    def is_stream(self) -> bool:
        return self.streaming

    @model_validator(mode="after")
    def _check_keys(self) -> HubConfig:
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError("'shuffle_buffer' needs streaming: true; set 'streaming', or remove 'shuffle_buffer'")
        if self.image is None and self.image_folder is not None:
            raise ValueError("'image_folder' has no effect without an 'image' column; remove it, or set 'image'")
        if self.image is None and (self.buckets or self.max_aspect_ratio):
            raise ValueError("buckets have no effect without an 'image' column; remove 'buckets' or 'max_aspect_ratio'")
        return self
