"""Data read by the library ``datasets``: by index, or as a stream; and where in a column an image is."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image

from longalign.data.base import Data, check_index
from longalign.data.configs import HubConfig, HubPairsConfig
from longalign.data.image_dataset import ImageDataset
from longalign.data.lines import inside
from longalign.data.stream import Record, Stream
from longalign.runtime import Runtime
from longalign.segment import check_text


def load(what: str, path: str, **settings: Any) -> Any:
    """``datasets.load_dataset``, with an error that says what to install where it is missing.

    Args:
        what: the data kind that asks, for the message.
        path: hub id, folder, or a format such as "parquet".
        **settings: what else `load_dataset` takes; those that are None are left out.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"the data '{what}' is read by the package datasets, which is not installed: pip install datasets"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:  # which would ask whether to run a repository's code
        settings["trust_remote_code"] = False
    try:
        return datasets.load_dataset(path, **{key: value for key, value in settings.items() if value is not None})
    except (OSError, ValueError):
        raise
    except Exception as error:  # what datasets raises of a script, and of files that it cannot read
        raise ValueError(f"datasets cannot read '{path}': {type(error).__name__}: {error}") from error


def open_columns(config: HubConfig | HubPairsConfig, texts: Sequence[str], images: Sequence[str]) -> Any:
    """The configured dataset with some of its columns alone, images undecoded.

    Args:
        config: says which dataset.
        texts: columns that are read as they are.
        images: columns of images.

    Raises:
        ValueError: if a column is missing; the message names those there are.
    """
    found = load(
        config.name,
        config.dataset,
        name=config.subset,
        split=config.split,
        revision=config.revision,
        data_files=[*config.files] or None,
        cache_dir=config.cache,
        streaming=config.streaming if isinstance(config, HubConfig) else None,
    )
    wanted = [*texts, *images]
    there = found.column_names or list(next(iter(found), {}))
    if missing := [column for column in wanted if column not in there]:
        raise ValueError(f"'{config.dataset}' has no column '{missing[0]}'; there is {', '.join(there)}")
    found = found.select_columns(wanted)
    if images and found.features is not None:
        import datasets

        for column in images:
            if isinstance(found.features[column], datasets.Image):
                found = found.cast_column(column, datasets.Image(decode=False))
    return found


def folder_of(config: HubConfig | HubPairsConfig, rows: Any) -> Path | None:
    """Where the paths of a table's images begin; None where the table may not have any.

    A table may come from anyone, so its paths are not to choose freely what is read from this machine. Those of a
    folder of images are made by ``datasets`` itself.
    """
    if config.image_folder is not None:
        return Path(config.image_folder)
    return Path(os.sep) if getattr(rows, "builder_name", None) == "imagefolder" else None


def image_source(value: Any, folder: Path | None) -> Path | bytes:
    """Where the image in a cell is: encoded bytes, a path in ``folder``, both as a mapping, or a decoded image.

    Raises:
        ValueError: if it is none of these, or a path that leads out of the folder, or there is no folder.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        if folder is None:
            raise ValueError(f"{value!r:.200} is a path; set image_folder to the folder that the images are in")
        return inside(folder, value)
    if isinstance(value, Image):  # decoded already, where a stream does not say that the column has images
        buffer = BytesIO()
        try:
            value.save(buffer, "PNG")
        except Exception as error:  # it may be decoded here only, see `longalign.image_io.decode`
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return buffer.getvalue()
    raise ValueError(f"expected an image, its bytes or its path, got {value!r:.60}")


def caption_from_cell(value: Any, where: str = "") -> str:
    """The caption in a cell; null is empty. Raises ValueError, with ``where`` it is, for what is no text."""
    what = f"{where}: the caption" if where else "a caption"
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} must be a text, got {value!r:.60}")
    return check_text(value or "", what).strip()


def build(config: HubConfig, runtime: Runtime) -> HubRows | HubPrompts | HubStream:
    """The data that a config asks for."""
    rows = open_columns(config, [config.caption], [] if config.image is None else [config.image])
    if config.streaming:
        return HubStream(rows, config)
    return HubPrompts(rows, config) if config.image is None else HubRows(rows, config)


class _Captions:
    """Captions of a table, empty ones left out unless they are kept."""

    def __init__(self, rows: Any, config: HubConfig):
        captions = rows[config.caption]
        kept = range(len(captions))
        if config.empty == "skip":
            kept = [
                i for i, caption in enumerate(captions) if caption_from_cell(caption, f"row {i} of {config.dataset}")
            ]
        if not kept:
            raise ValueError(f"'{config.dataset}' has no caption in its column '{config.caption}'")
        self.captions, self.kept = captions, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> str:
        return caption_from_cell(self.captions[self.kept[check_index(index, len(self))]])


class HubRows(ImageDataset):
    """Rows of a table with an image each, by index.

    Args:
        rows: of the library ``datasets``, with images undecoded.
        config: says which columns to read, and how.
    """

    def __init__(self, rows: Any, config: HubConfig):
        super().__init__(config.resolution, config.max_unreadable)
        self.rows, self.config, self.captions = rows, config, _Captions(rows, config)
        self.folder = folder_of(config, rows)

    def __len__(self) -> int:
        return len(self.captions)

    def prompt(self, index: int) -> str:
        return self.captions[index]

    def label(self, index: int) -> str:
        return f"row {self.captions.kept[index]} of {self.config.dataset}"

    def source(self, index: int) -> Path | bytes:
        return image_source(self.rows[int(self.captions.kept[index])][self.config.image], self.folder)


class HubPrompts(Data):
    """Captions of a table alone, by index."""

    has_images = False

    def __init__(self, rows: Any, config: HubConfig):
        self.captions = _Captions(rows, config)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompt(index)}

    def prompt(self, index: int) -> str:
        return self.captions[index]


class HubStream(Stream):
    """Rows as they are read, shard by shard, nothing stored.

    Args:
        rows: a streaming dataset of the library ``datasets``.
        config: says which columns to read, and how.
    """

    def __init__(self, rows: Any, config: HubConfig):
        self.has_images = config.image is not None
        super().__init__(config.resolution, config.empty, config.max_unreadable, config.shuffle_buffer or 1000)
        self.rows, self.config, self.folder = rows, config, folder_of(config, rows)

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def read(self, shard: int) -> Iterator[Record]:
        where = f"shard {shard} of {self.config.dataset}"
        try:
            for number, row in enumerate(self.rows.shard(num_shards=self.num_shards, index=shard)):
                yield self._record(f"row {number} of {where}", row)
        except Exception as error:  # each format has errors of its own for a damaged file
            self.unreadable.note(f"the rest of {where}", error)

    def _record(self, name: str, row: Any) -> Record:
        try:
            image = None if self.config.image is None else image_source(row[self.config.image], self.folder)
            return Record(name, caption_from_cell(row[self.config.caption]), image)
        except ValueError as error:
            return Record(name, problem=str(error))


def files_of(path: Path) -> tuple[str, list[str]]:
    """Format and files that a local table is read from: a file, or a folder of files of one kind.

    Raises:
        ValueError: if it is neither .parquet, .csv, .jsonl nor .json.
    """
    formats = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
    found = sorted(glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True)) if path.is_dir() else [str(path)]
    kinds = {Path(file).suffix for file in found} & set(formats)
    if len(kinds) != 1:
        raise ValueError(f"{path} should be or hold .parquet, .csv or .jsonl files of one kind, found {sorted(kinds)}")
    (kind,) = kinds
    return formats[kind], [file for file in found if file.endswith(kind)]
