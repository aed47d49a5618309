"""Configs of the bundled data. Importing this module does not import torch."""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from longalign.data.config import DataConfig
from longalign.data.lines import missing_shard
from longalign.errors import ConfigProblem, redact_url
from longalign.runtime import Runtime

Text = Annotated[str, Field(min_length=1)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]


def _check_range(value: tuple[int, int], key: str) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"{key} must be [lowest, highest], got {list(value)}")
    return value


def _no_folder(key: str, folder: str | None) -> list[ConfigProblem]:
    return [(key, f"no folder {folder}")] if folder is not None and not Path(folder).is_dir() else []


def _no_metadata(folder: str, keys: str) -> list[ConfigProblem]:
    path = Path(folder) / "metadata.jsonl"
    return [] if path.is_file() else [("folder", f"no file {path}; expected one JSON mapping per line with {keys}")]


class ImagesConfig(DataConfig):
    """Base class of configs of stored images.

    Attributes:
        resolution: centre-crop and resize images to this many pixels; null is the backbone's native resolution. Smaller
            images are scaled up, with a warning.
        empty: "skip" images with an empty caption, or "keep" them as unconditional examples.
        max_unreadable: number of unreadable images, caption files and shards to replace by the next one, each with a
            warning; one more stops the run. Each data loading process counts its own.
    """

    resolution: PositiveInt | None = None
    empty: Literal["skip", "keep"] = "skip"
    max_unreadable: NonNegativeInt = 10

    @property
    def image_size(self) -> int | None:
        return self.resolution


class PairedImagesConfig(DataConfig):
    """Base class of configs of stored preference data.

    Attributes:
        resolution: centre-crop and resize images to this many pixels.
        max_unreadable: number of pairs with an unreadable image to replace by the next pair, each with a warning; one
            more stops the run. Each data loading process counts its own.
    """

    has_pairs: ClassVar[bool] = True

    resolution: PositiveInt = 224
    max_unreadable: NonNegativeInt = 10

    @property
    def image_size(self) -> int | None:
        return self.resolution


class TableConfig(DataConfig):
    """Base class of configs of tables read with the library ``datasets``: Hub datasets, parquet files, or any format it
    supports.

    Attributes:
        dataset: Hub id, local folder, or a format such as "parquet", "json" or "webdataset" for ``files``.
        subset: configuration name of the dataset.
        split: split to load.
        revision: branch, tag or commit on the Hub.
        files: paths or URLs of the files to read; ``*`` is allowed.
        caption: column of the captions or prompts.
        image_folder: folder of the images if the image column holds paths, which must not lead out of it. ``/`` allows
            any absolute path.
        cache: cache folder of ``datasets``; null is its default.
    """

    dataset: Text
    subset: Text | None = None
    split: Text = "train"
    revision: Text | None = None
    files: Texts = ()
    caption: Text = "caption"
    image_folder: Text | None = None
    cache: Text | None = None

    def check_files(self) -> list[ConfigProblem]:
        problems = _no_folder("image_folder", self.image_folder)
        missing = [f for f in self.files if "://" not in f and not glob(f, recursive=True)]
        return problems + [("files", f"no file {redact_url(f)}") for f in missing]


class ScenesConfig(DataConfig):
    """Synthetic scenes with captions of configurable length, rendered on demand.

    Attributes:
        size: number of scenes. Seed and index determine a scene.
        seed: random seed of the scenes. Use different seeds for training and held-out sets.
        objects: lowest and highest number of objects in a scene, between 0 and 9.
        words: lowest and highest target length of a caption in words; lengths are uniform in between.
        style: "plain" (self-contained sentences), "referring" ("It is red."), or "mixed" (both, equally often).
    """

    name: Literal["scenes"] = "scenes"
    size: PositiveInt = 10_000
    seed: NonNegativeInt = 0
    objects: tuple[Annotated[int, Field(ge=0, le=9)], Annotated[int, Field(ge=0, le=9)]] = (1, 9)
    words: tuple[PositiveInt, PositiveInt] = (20, 250)
    style: Literal["plain", "referring", "mixed"] = "plain"

    @field_validator("objects", "words")
    @classmethod
    def _check_ranges(cls, value: tuple[int, int], info: Any) -> tuple[int, int]:
        return _check_range(value, info.field_name)

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.scenes import Scenes

        return Scenes.from_config(self, runtime)


class ScenePairsConfig(ScenesConfig):
    """Pairs of synthetic scenes for training preference models.

    Both images show the scene of the caption with some wrong facts and different lighting. The fraction of people who
    prefer the first image depends on faithfulness to the caption and on a caption-independent taste.

    Attributes:
        truth_weight: weight of the difference in truth, the fraction of the caption's facts that an image shows. The
            preference is the sigmoid of the sum of both weighted differences.
        taste_weight: weight of the difference in taste, from -1 to 1; warm light and dark corners score high.
        captions: whether each image also has its own caption, as long as the prompt.
    """

    has_pairs: ClassVar[bool] = True

    name: Literal["scene-pairs"] = "scene-pairs"  # pyright: ignore[reportIncompatibleVariableOverride]
    truth_weight: float = Field(10.0, ge=0)
    taste_weight: float = Field(4.0, ge=0)
    captions: bool = False

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.scenes import ScenePairs

        return ScenePairs.from_config(self, runtime)


class FolderConfig(ImagesConfig):
    """Captioned images of a folder.

    Attributes:
        folder: folder with ``metadata.jsonl``, one line per image with "file_name" and "text" (or "prompt"), as
            ``longalign generate`` writes it, or with ``metadata.csv`` with these columns. Without either, a .txt of the
            same name next to each image, also in subfolders, is its caption. File names are relative to the folder and
            must not lead out of it; links are followed.
    """

    name: Literal["folder"] = "folder"
    folder: Text

    def check_files(self) -> list[ConfigProblem]:
        folder = Path(self.folder)
        indexed = any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv"))
        if indexed or next(folder.rglob("*.txt"), None) is not None:
            return []
        message = f"{folder} has neither metadata.jsonl nor metadata.csv nor .txt files of captions"
        return _no_folder("folder", self.folder) or [("folder", message)]

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.folder import Folder

        return Folder.from_config(self, runtime)


class HubConfig(TableConfig, ImagesConfig):
    """A table read with the library ``datasets``: a Hub dataset, parquet files, or any format it supports.

    Attributes:
        image: column of images, encoded bytes or paths; null reads only captions, for reward fine-tuning.
        streaming: stream shards during training instead of downloading the dataset first. Shards are distributed over
            processes and workers.
        shuffle_buffer: shuffle buffer size of a stream; null is 1000.
    """

    name: Literal["hf"] = "hf"
    image: Text | None = "image"
    streaming: bool = False
    shuffle_buffer: PositiveInt | None = None

    @property
    def has_images(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.image is not None

    @model_validator(mode="after")
    def _check_keys(self) -> HubConfig:
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError("'shuffle_buffer' needs streaming: true; set it or remove 'shuffle_buffer'")
        if self.image is None and self.image_folder is not None:
            raise ValueError("'image_folder' has no effect without an 'image' column; remove it")
        return self

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.hub import build_hub_data

        return build_hub_data(self, runtime)


class PairsConfig(PairedImagesConfig):
    """Preference data of a folder: pairs of images with a prompt and a preference.

    Attributes:
        folder: folder with ``metadata.jsonl``, one line per pair: files "image_0" and "image_1", "text" (or "prompt"),
            and "label_0" and "label_1" (1 and 0, fractions or votes; equal is a tie) or "preference" (the fraction that
            prefers the first image). Optional: a caption of each image, "caption_0" and "caption_1". Pairs without
            label are skipped.
    """

    name: Literal["pairs"] = "pairs"
    folder: Text

    def check_files(self) -> list[ConfigProblem]:
        return _no_folder("folder", self.folder) or _no_metadata(self.folder, '"image_0", "image_1", "text"')

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.pairs import FolderPairs

        return FolderPairs.from_config(self, runtime)


class HubPairsConfig(TableConfig, PairedImagesConfig):
    """Preference data of a table read with the library ``datasets``.

    The defaults are the columns of Pick-a-Pic (``yuvalkirstain/pickapic_v1``). For HPD v2, set ``images: image_path``,
    ``labels: human_preference`` and ``caption: prompt``.

    Attributes:
        images: two columns of images, encoded bytes or paths, or one column with a list of two.
        labels: two columns of numbers (1 and 0, fractions or votes; equal is a tie), one column with a list of two, or
            one column with the fraction that prefers the first image. Pairs without label are skipped.
        captions: two columns with a caption of each image, or one column with a list of two; empty for none.
    """

    name: Literal["hf-pairs"] = "hf-pairs"
    images: Annotated[Texts, Field(min_length=1, max_length=2)] = ("jpg_0", "jpg_1")
    labels: Annotated[Texts, Field(min_length=1, max_length=2)] = ("label_0", "label_1")
    captions: Annotated[Texts, Field(max_length=2)] = ()

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.pairs import HubPairs

        return HubPairs.from_config(self, runtime)


class WebDatasetConfig(ImagesConfig):
    """Local tar files in WebDataset layout, read as a stream. Files with the same stem form one item; files larger than
    256 MiB are not read.

    Attributes:
        shards: path or list of paths of tar files, with ``{0000..0123}`` for a range or ``*``.
        image: image suffixes in order of preference.
        caption: suffix of the caption file: "txt", or "json" with a ``field``.
        field: key of the caption in a JSON file; null is "caption".
        shuffle_buffer: shuffle buffer size; 1 keeps the order.
    """

    name: Literal["webdataset"] = "webdataset"
    shards: Annotated[Texts, Field(min_length=1)]
    image: Annotated[Texts, Field(min_length=1)] = ("jpg", "jpeg", "png", "webp")
    caption: Text = "txt"
    field: Text | None = None
    shuffle_buffer: PositiveInt = 1000

    def check_files(self) -> list[ConfigProblem]:
        return [("shards", problem) for pattern in self.shards if (problem := missing_shard(pattern))]

    @property
    def caption_field(self) -> str | None:
        """Key of the caption in a JSON file; None for a text file."""
        return (self.field or "caption") if self.caption.endswith("json") else None

    @model_validator(mode="after")
    def _check_keys(self) -> WebDatasetConfig:
        if self.field is not None and self.caption_field is None:
            raise ValueError(f"'field' is a key of JSON files, but '{self.caption}' is read as text; remove it")
        return self

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.webdataset import WebDataset

        return WebDataset.from_config(self, runtime)


class LongAlignCaptionsConfig(ImagesConfig):
    """The public LongAlign captions (2.27 million rows ``caption, path, source``) with local images.

    Attributes:
        folders: image folder of each source, by the names in the column ``source``; ``path`` is relative to it. Rows of
            other sources are skipped.
        captions: Hub id, a local .parquet, .csv or .jsonl file, or a folder of such files of one format.
        split: split to load.
        revision: branch, tag or commit on the Hub.
        cache: cache folder of the library ``datasets``; null is its default.
        max_missing: number of image files that may be missing; null is any number. Missing files are skipped at the
            start, with a warning.
    """

    name: Literal["longalign-captions"] = "longalign-captions"
    folders: Annotated[dict[str, Text], Field(min_length=1)]
    captions: Text = "luping-liu/LongAlign"
    split: Text = "train"
    revision: Text | None = None
    cache: Text | None = None
    max_missing: NonNegativeInt | None = None

    def check_files(self) -> list[ConfigProblem]:
        return [problem for key, folder in self.folders.items() for problem in _no_folder(f"folders.{key}", folder)]

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.captions import LongAlignCaptions

        return LongAlignCaptions.from_config(self, runtime)


class PromptsConfig(DataConfig):
    """Prompts of a file, without images, for reward fine-tuning.

    Attributes:
        file: .txt file with one prompt per line, or .jsonl file with "prompt" (or "text") in each line. Prompts with
            several paragraphs need .jsonl.
        empty: "skip" or "keep" empty prompts.
    """

    has_images: ClassVar[bool] = False

    name: Literal["prompts"] = "prompts"
    file: Text
    empty: Literal["skip", "keep"] = "skip"

    def check_files(self) -> list[ConfigProblem]:
        return [] if Path(self.file).is_file() else [("file", f"no file {self.file}")]

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.prompts import Prompts

        return Prompts.from_config(self, runtime)
