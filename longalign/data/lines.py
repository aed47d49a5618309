"""Prompts and captions from text files. Importing this module does not import torch."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from io import StringIO
from pathlib import Path
from typing import Any

from longalign.config.files import check_folder
from longalign.segmenters import check_text

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


def inside(folder: Path | str, name: str, where: str = "") -> Path:
    """Path of the file ``name`` in a folder.

    File names in data are untrusted, so ``..`` and absolute paths must not lead out of the folder. Links are followed:
    the owner of the folder made them, and the Hub cache consists of links.

    Args:
        folder: the folder.
        name: path relative to the folder, or an absolute path inside it.
        where: location of the name in the data, for the message.

    Raises:
        ValueError: if the path is outside of the folder.
    """
    if ".." not in name and not os.path.isabs(name):
        return Path(folder) / name
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        prefix = f"{where}: " if where else ""
        raise ValueError(f"{prefix}{name!r:.200} leads out of {folder}; expected a file in that folder")
    return Path(folder) / os.path.relpath(path, root)


def read_prompts(path: Path | str) -> list[str]:
    """Reads prompts from a ``.txt`` file, one per line, or a ``.jsonl`` file ("text" or "prompt"), empty ones included.

    Raises:
        ValueError: if the file has a different suffix, or a line has no prompt; the message has the line number.
        FileNotFoundError: if the file does not exist.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return [text_of(row, where) for where, row in read_jsonl(path)]
    if path.suffix != ".txt":
        raise ValueError(f"expected a .txt or .jsonl file of prompts, got {path}")
    lines = _read(path).split("\n")
    return [line.strip() for line in (lines[:-1] if not lines[-1] else lines)]


def read_jsonl(path: Path, example: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Reads the mappings of a ``.jsonl`` file, each with its location ("file, line n"); empty lines are skipped.

    Args:
        path: the file.
        example: a valid line, shown in the message if the file does not exist.

    Raises:
        ValueError: if a line is not a JSON mapping; the message has the line number.
        FileNotFoundError: if the file does not exist.
    """
    if example and not path.exists():
        raise FileNotFoundError(f"no file {path}; expected one line per item, e.g. {example}")
    rows: list[tuple[str, Mapping[str, Any]]] = []
    # not str.splitlines, which also splits at U+2028 and other characters that captions contain
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a mapping, got {line.strip()[:80]}")
        rows.append((where, row))
    return rows


def read_captions(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Reads rows with "file_name" and "text" (or "prompt") of a folder's images, each with its location.

    Reads ``metadata.jsonl`` or ``metadata.csv``. Without either, reads a ``.txt`` of the same name next to each
    image in the folder and its subfolders, sorted by path.

    Raises:
        ValueError: if both ``metadata.jsonl`` and ``metadata.csv`` exist, or a file cannot be read.
        FileNotFoundError: if no captions exist.
    """
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if lines.exists() and table.exists():
        raise ValueError(f"both {lines} and {table} exist; remove one of them")
    if lines.exists():
        return read_jsonl(lines)
    if table.exists():
        return _read_csv(table)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    images = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    images = sorted(p for p in images if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    captioned = [path for path in images if path.with_suffix(".txt").is_file()]
    if not captioned:
        raise FileNotFoundError(
            f"no file {lines}; expected one line per image, e.g. "
            '{"file_name": "0001.png", "text": "A red fox."}, or a metadata.csv with these columns, or a .txt of the '
            f"same name next to each image (found for none of {len(images)} images)"
        )
    if len(captioned) < len(images):
        skipped = len(images) - len(captioned)
        log.warning("%d of %d images in %s have no .txt and are skipped", skipped, len(images), folder)
    texts = [path.with_suffix(".txt") for path in captioned]
    return [
        (str(text), {"file_name": str(path.relative_to(folder)), "text": _read(text)})
        for path, text in zip(captioned, texts, strict=True)
    ]


def _read_csv(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    reader = csv.DictReader(StringIO(_read(path), newline=""))
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{where} has more cells than columns; quote texts that contain commas")
            rows.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def text_of(row: Mapping[str, Any], where: str) -> str:
    """Text of a row: "text" or "prompt"; null is the empty text."""
    key = next((k for k in ("text", "prompt") if k in row), None)
    if key is None:
        raise ValueError(f"{where} has neither 'text' nor 'prompt'; available: {', '.join(row) or 'nothing'}")
    if row[key] is not None and not isinstance(row[key], str):
        raise ValueError(f"{where}: '{key}' must be a string, got {row[key]!r}")
    return check_text(row[key] or "", f"{where}: '{key}'").strip()


def new_index(folder: Path | str, overwrite: bool = False) -> Path:
    """Path of a new ``metadata.jsonl`` in an output folder.

    Raises:
        ValueError: if the file already lists images and ``overwrite`` is False, or cannot be read.
    """
    check_folder(Path(folder))
    path = Path(folder) / "metadata.jsonl"
    if overwrite:
        if path.exists():
            list(read_jsonl(path))  # raises if the list of images to replace is unreadable
        return path
    count = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if path.exists() else 0
    if count:
        raise ValueError(
            f"{path} lists {count} image{'s' if count > 1 else ''}; choose an empty folder for the new ones, or remove "
            f"{folder} if an interrupted run left it"
        )
    return path


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError if a seed occurs twice, since file names consist of prompt and seed."""
    if repeated := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ValueError(f"expected different seeds, got {', '.join(map(str, repeated))} more than once")


def remove_listed(index: Path) -> None:
    """Removes a ``metadata.jsonl`` and the images in its folder that it lists."""
    if not index.exists():
        return
    for _, row in read_jsonl(index):
        name = row.get("file_name")
        if isinstance(name, str) and Path(name).name == name:
            (index.parent / name).unlink(missing_ok=True)
    index.unlink()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def find_shards(pattern: str) -> list[Path]:
    """Expands a path with a range ``{0000..0123}`` (both ends included) or with ``*`` to tar files, in order.

    Raises:
        FileNotFoundError: if no file matches, or a file of the range is missing.
    """
    return list(_expand(pattern))


def _expand(pattern: str) -> Iterator[Path]:
    span = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    if span:
        start, stop = span.groups()
        if int(start) > int(stop):
            raise FileNotFoundError(f"no shard {pattern}: {start} is more than {stop}")
        for number in range(int(start), int(stop) + 1):
            yield from _expand(f"{pattern[: span.start()]}{number:0{len(start)}d}{pattern[span.end() :]}")
        return
    paths = sorted(glob(pattern)) if any(wildcard in pattern for wildcard in "*?[") else [pattern]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"no shard {missing[0] if missing else pattern}")
    yield from map(Path, paths)


def missing_shard(pattern: str) -> str:
    """Error message for the first missing shard of a path; empty if none is missing."""
    try:
        deque(_expand(pattern), maxlen=0)
    except FileNotFoundError as error:
        return str(error)
    return ""
