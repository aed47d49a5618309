"""Reads tables with the library ``datasets``, and images and captions from table cells."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image

from longalign.data.tables.config import TableConfig
from longalign.files.lines import inside
from longalign.segmenters import check_text


def load_table(part: str, path: str, **settings: Any) -> Any:
    """Returns the table that ``datasets.load_dataset`` loads.

    Args:
        part: name of the data part in the message that ``datasets`` is not installed.
        path: Hub id, folder, or a format such as "parquet".
        **settings: further arguments of ``load_dataset``; None values are omitted.

    Raises:
        ValueError: if ``datasets`` is not installed, or cannot read the table.
        OSError: as raised by ``datasets``, e.g. for missing files.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"the data part '{part}' needs the package datasets, which is not installed: pip install datasets"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:  # versions below 4 may run code from the repository
        settings["trust_remote_code"] = False
    try:
        return datasets.load_dataset(path, **{key: value for key, value in settings.items() if value is not None})
    except (OSError, ValueError):
        raise
    except Exception as error:  # datasets has its own errors for scripts and unreadable files
        raise ValueError(
            f"datasets cannot read '{path}': {type(error).__name__}: {error}; check the name, the split and the files"
        ) from error


def table_files(path: Path) -> tuple[str, list[str]]:
    """Returns the format and the files of a local table: ``path`` and ``data_files`` of ``datasets.load_dataset``.

    Args:
        path: a .parquet, .csv, .jsonl or .json file, or a folder that has, also in its subfolders, files of one of
            these formats. Files of any other format are ignored.

    Raises:
        ValueError: if there are no files of these four formats, or files of several of them.
    """
    formats = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
    files = sorted(glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True)) if path.is_dir() else [str(path)]
    suffixes = {Path(file).suffix for file in files} & set(formats)
    if len(suffixes) != 1:
        got = ", ".join(sorted(suffixes)) or "none of these"
        raise ValueError(f"{path}: expected files of one format of .parquet, .csv, .jsonl and .json, got {got}")
    (suffix,) = suffixes
    return formats[suffix], [file for file in files if file.endswith(suffix)]


def open_columns(config: TableConfig, texts: Sequence[str], images: Sequence[str]) -> Any:
    """Returns the configured table of the library ``datasets``, reduced to the given columns.

    Args:
        config: which table to load.
        texts: names of columns that are read unchanged.
        images: names of image columns; the images are not decoded.

    Raises:
        ValueError: if `load_table` fails, or a column is missing; the message lists the available ones.
    """
    rows = load_table(
        config.name,
        config.dataset,
        name=config.subset,
        split=config.split,
        revision=config.revision,
        data_files=[*config.files] or None,
        cache_dir=config.cache,
        streaming=config.is_stream,
    )
    columns = [*texts, *images]
    available = rows.column_names or list(next(iter(rows), {}))
    if missing := [column for column in columns if column not in available]:
        raise ValueError(
            f"'{config.dataset}' has no column '{missing[0]}'; available: {', '.join(available)}. Name one of these"
        )
    rows = rows.select_columns(columns)
    if images and rows.features is not None:
        import datasets

        for column in images:
            if isinstance(rows.features[column], datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def image_folder(config: TableConfig, rows: Any) -> Path | None:
    """Returns the folder that a table's image paths are relative to, or None if paths are not allowed.

    Tables are untrusted, so their paths must not reach arbitrary local files. If ``config.image_folder`` is None, only
    tables that ``datasets`` reads with its format ``imagefolder`` may hold paths, since ``datasets`` itself makes these
    paths. They are relative to ``/``.

    Args:
        config: config of the table.
        rows: the table.
    """
    if config.image_folder is not None:
        return Path(config.image_folder)
    return Path(os.sep) if getattr(rows, "builder_name", None) == "imagefolder" else None


def image_source(value: Any, folder: Path | None) -> Path | bytes:
    """Returns the path of the image file in a table cell, or the bytes of such a file.

    Args:
        value: the cell: bytes of an image file, a path in ``folder``, a mapping with "bytes" or "path", or a decoded
            PIL image, which is returned as PNG.
        folder: folder that paths are relative to; None rejects paths.

    Raises:
        ValueError: if the cell is none of these, or a path that is outside ``folder`` or given while ``folder`` is
            None.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        if folder is None:
            raise ValueError(f"{value!r:.200} is a path; set image_folder to the folder of the images")
        return inside(folder, value)
    if isinstance(value, Image):  # streams without declared features decode images
        buffer = BytesIO()
        try:
            value.save(buffer, "PNG")
        except Exception as error:  # PIL decodes lazily, so any decoding error can occur here
            raise ValueError(f"the image cannot be decoded ({type(error).__name__}: {error})") from error
        return buffer.getvalue()
    raise ValueError(f"expected an image, its bytes or its path in the cell, got {value!r:.60}")


def caption_from_cell(value: Any, where: str = "") -> str:
    """Returns the caption in a table cell, without surrounding whitespace. None becomes the empty caption.

    Raises:
        ValueError: if the cell is neither a string nor None. The message starts with ``where``, the location of the
            cell.
    """
    label = f"{where}: the caption" if where else "a caption"
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{label} must be a string, got {value!r:.60}")
    return check_text(value or "", label).strip()
