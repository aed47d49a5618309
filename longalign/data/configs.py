"""Configs of the bundled data; importing this module does not import torch."""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from longalign.data.lines import missing_shard
from longalign.errors import ConfigProblem, redact_url
from longalign.registry import PartConfig
from longalign.runtime import Runtime

Text = Annotated[str, Field(min_length=1)]


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_several)]


def _rising(value: tuple[int, int], what: str) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"{what} must be [lowest, highest], got {list(value)}")
    return value


def _no_folder(key: str, folder: str | None) -> list[ConfigProblem]:
    return [(key, f"no folder {folder}")] if folder is not None and not Path(folder).is_dir() else []


def _no_metadata(folder: str, keys: str) -> list[ConfigProblem]:
    path = Path(folder) / "metadata.jsonl"
    return [] if path.is_file() else [("folder", f"no file {path}; expected one mapping per line with {keys}")]


class DataConfig(PartConfig):
    """Base of data configs. ``has_images`` says whether the items have images, or prompts alone; ``has_pairs`` whether
    they have two images and which one is preferred."""

    has_images: ClassVar[bool] = True
    has_pairs: ClassVar[bool] = False


class ImagesConfig(DataConfig):
    """Base of configs of images that are stored somewhere.

    Attributes:
        resolution: side in pixels of the square that is cut out of the middle of each image and scaled; null is the
            backbone's own. Smaller images are scaled up, with a warning.
        empty: what to do with an empty caption: "skip" its image, or "keep" it as an unconditional example.
        max_unreadable: how many unreadable images, or shards and captions that are files of their own, are named in a
            warning and replaced by the next one; one more stops the run. Each loading process counts its own.
    """

    resolution: PositiveInt | None = None
    empty: Literal["skip", "keep"] = "skip"
    max_unreadable: NonNegativeInt = 10


class PairedImagesConfig(DataConfig):
    """Base of configs of pairs of images that are stored somewhere, with which of the two is preferred.

    Attributes:
        resolution: side in pixels of the square that is cut out of the middle of each image and scaled.
        max_unreadable: how many pairs with an unreadable image are named in a warning and replaced by the next one; one
            more stops the run. Each loading process counts its own.
    """

    has_pairs: ClassVar[bool] = True

    resolution: PositiveInt = 224
    max_unreadable: NonNegativeInt = 10


class TableConfig(DataConfig):
    """Base of configs of tables that the library ``datasets`` reads: from the hub, parquet files, or any format it
    knows.

    Attributes:
        dataset: hub id, local folder, or a format such as "parquet", "json" or "webdataset" for ``files``.
        subset: name of a configuration of the dataset.
        split: which split.
        revision: branch, tag or commit on the hub.
        files: paths or URLs, ``*`` allowed, of the files to read.
        caption: column of the captions, or prompts.
        image_folder: where paths of images begin, which may not lead out of it; needed where images are paths. ``/``
            allows any absolute path.
        cache: folder for what ``datasets`` stores; null is its own.
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
    """Scenes of the bundled small world with captions of chosen length; drawn when asked for, nothing is stored.

    Attributes:
        size: number of scenes. Scene i of a seed is always the same one.
        seed: another seed gives other scenes; give held-out sets another one than training sets.
        objects: lowest and highest number of objects in a scene, within 0 and 9.
        words: lowest and highest length aimed at of a caption, in words; each length between is equally likely.
        style: "plain" (each sentence can be read alone), "referring" ("It is red."), or "mixed" (either, evenly).
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
        return _rising(value, info.field_name)

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.scenes import Scenes

        return Scenes.from_config(self, runtime)


class ScenePairsConfig(ScenesConfig):
    """Pairs of images of the small world's captions, for training preference models: both show the caption's scene with
    some facts wrong and looks of their own; truth to the caption and a taste that no caption tells of decide how many
    people prefer the first.

    Attributes:
        truth_weight: factor of the difference in truth, the share of the caption's facts that an image shows; the
            share of people is the sigmoid of the two weighted differences' sum.
        taste_weight: factor of the difference in taste, which likes warm light and dark corners, from -1 to 1.
        captions: whether each image has a caption of its own too, as long as the prompt.
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
    """Images of a folder, each with a caption.

    Attributes:
        folder: the folder; ``metadata.jsonl`` in it has one line per image, with "file_name" and "text" (or "prompt"),
            as ``longalign generate`` writes it, or ``metadata.csv`` has these columns; without either, a .txt of the
            same name beside each image, also in subfolders, is its caption. File names are relative to the folder and
            may not lead out of it; links are followed.
    """

    name: Literal["folder"] = "folder"
    folder: Text

    def check_files(self) -> list[ConfigProblem]:
        folder = Path(self.folder)
        indexed = any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv"))
        if indexed or next(folder.rglob("*.txt"), None) is not None:
            return []
        message = f"{folder} has neither metadata.jsonl nor metadata.csv nor a .txt beside an image"
        return _no_folder("folder", self.folder) or [("folder", message)]

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.folder import Folder

        return Folder.from_config(self, runtime)


class HubConfig(TableConfig, ImagesConfig):
    """A table that the library ``datasets`` reads: from the hub, parquet files, or any format it knows.

    Attributes:
        image: column of the images: images, their bytes or their paths; null reads captions alone, for reward
            fine-tuning.
        streaming: read while training, storing nothing, instead of downloading first; shards are dealt to processes and
            workers.
        shuffle_buffer: records of a stream among which the next is drawn; null is 1000.
    """

    name: Literal["hf"] = "hf"
    image: Text | None = "image"
    streaming: bool = False
    shuffle_buffer: PositiveInt | None = None

    @property
    def has_images(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.image is not None

    @model_validator(mode="after")
    def _agree(self) -> HubConfig:
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError("'shuffle_buffer' belongs to a stream; set streaming to true or leave it out")
        if self.image is None and self.image_folder is not None:
            raise ValueError("'image_folder' has no effect without an 'image' column")
        return self

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.hub import build

        return build(self, runtime)


class PairsConfig(PairedImagesConfig):
    """A folder of images in pairs of one prompt each, with which of the two is preferred.

    Attributes:
        folder: the folder; ``metadata.jsonl`` in it has one line per pair: the files "image_0" and "image_1", "text"
            (or "prompt"), "label_0" and "label_1" (1 and 0, shares or votes; equal is no preference) or "preference"
            (the share that prefers the first), and, if there are any, a caption of each image, "caption_0" and
            "caption_1". Pairs without label are left out.
    """

    name: Literal["pairs"] = "pairs"
    folder: Text

    def check_files(self) -> list[ConfigProblem]:
        return _no_folder("folder", self.folder) or _no_metadata(self.folder, '"image_0", "image_1", "text"')

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.pairs import FolderPairs

        return FolderPairs.from_config(self, runtime)


class HubPairsConfig(TableConfig, PairedImagesConfig):
    """Pairs of images of a table that the library ``datasets`` reads. The defaults are the columns of Pick-a-Pic
    (``yuvalkirstain/pickapic_v1``); HPD v2 has ``images: image_path``, ``labels: human_preference`` and
    ``caption: prompt``.

    Attributes:
        images: two columns of images, their bytes or their paths, or one that has a list of two.
        labels: two columns of numbers (1 and 0, shares or votes; equal is no preference), one that has a list of two,
            or one with the share that prefers the first. Pairs without label are left out.
        captions: two columns of captions, one for each image, or one that has a list of two; none if empty.
    """

    name: Literal["hf-pairs"] = "hf-pairs"
    images: Annotated[Texts, Field(min_length=1, max_length=2)] = ("jpg_0", "jpg_1")
    labels: Annotated[Texts, Field(min_length=1, max_length=2)] = ("label_0", "label_1")
    captions: Annotated[Texts, Field(max_length=2)] = ()

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.pairs import HubPairs

        return HubPairs.from_config(self, runtime)


class WebDatasetConfig(ImagesConfig):
    """Local tar files in webdataset's layout, read as a stream: files of one stem are an item. Of these, files of more
    than 256 MiB are not read.

    Attributes:
        shards: paths of the tar files, with ``{0000..0123}`` for a range or ``*``; one or a list.
        image: endings of images, in order of preference.
        caption: ending of the caption's file: "txt", or "json" with a ``field``.
        field: key of the caption in a JSON file; null is "caption" there.
        shuffle_buffer: records among which the next is drawn; 1 keeps the order.
    """

    name: Literal["webdataset"] = "webdataset"
    shards: Annotated[Texts, Field(min_length=1)]
    image: Annotated[Texts, Field(min_length=1)] = ("jpg", "jpeg", "png", "webp")
    caption: Text = "txt"
    field: Text | None = None
    shuffle_buffer: PositiveInt = 1000

    def check_files(self) -> list[ConfigProblem]:
        return [("shards", problem) for given in self.shards if (problem := missing_shard(given))]

    @property
    def caption_field(self) -> str | None:
        """Key of the caption in a JSON file, None where the file is the caption."""
        return (self.field or "caption") if self.caption.endswith("json") else None

    @model_validator(mode="after")
    def _agree(self) -> WebDatasetConfig:
        if self.field is not None and self.caption_field is None:
            raise ValueError(f"'field' is a key of JSON, and '{self.caption}' is read as text; leave it out")
        return self

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.webdataset import WebDataset

        return WebDataset.from_config(self, runtime)


class LongAlignCaptionsConfig(ImagesConfig):
    """The public LongAlign captions (2.27 million rows ``caption, path, source``) with images of local folders.

    Attributes:
        folders: folder of the images of each source, by the names in the column ``source``; rows of other sources are
            left out. ``path`` is looked for in its source's folder.
        captions: hub id, or a local .parquet, .csv or .jsonl file, or a folder of such files of one kind.
        split: which split.
        revision: branch, tag or commit on the hub.
        cache: folder for what the library ``datasets`` stores; null is its own.
        max_missing: how many images may be missing in the folders, or null for any number; they are looked for once, at
            the start, counted in a warning and left out.
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
    """Prompts of a file, without images: for reward fine-tuning, which draws its own.

    Attributes:
        file: a .txt file with one prompt per line, or a .jsonl file with "prompt" (or "text") in each line; the latter
            for prompts of several paragraphs.
        empty: what to do with an empty prompt: "skip" or "keep" it.
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
