"""Prompts and captions from text files; importing this module does not import torch."""

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

from longalign.files import check_folder
from longalign.segment import check_text

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


def inside(folder: Path | str, name: str, where: str = "") -> Path:
    """The file that data call ``name`` in a folder.

    Names come with data, from whoever made them, so none may lead elsewhere with ``..`` or an absolute path. Links are
    followed: they are made by whoever has the folder, and the hub's cache consists of them.

    Args:
        folder: the folder.
        name: relative to it; an absolute path is taken if it begins with the folder.
        where: place of the name, for the message.

    Raises:
        ValueError: if the name leads out of the folder.
    """
    if ".." not in name and not os.path.isabs(name):
        return Path(folder) / name
    home = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(home, name))
    if os.path.commonpath([home, path]) != home:
        prefix = f"{where}: " if where else ""
        raise ValueError(f"{prefix}{name!r:.200} leads out of {folder}; expected a file in that folder")
    return Path(folder) / os.path.relpath(path, home)


def read_prompts(path: Path | str) -> list[str]:
    """The prompts of a ``.txt`` file, one per line, or a ``.jsonl`` file ("text" or "prompt"); empty ones included.

    Raises:
        ValueError: if the file is of another kind, or a line has no prompt; the line is named.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return [text_of(row, where) for where, row in read_jsonl(path)]
    if path.suffix != ".txt":
        raise ValueError(f"prompts come from a .txt or a .jsonl file, not from {path}")
    lines = _read(path).split("\n")
    return [line.strip() for line in (lines[:-1] if not lines[-1] else lines)]


def read_jsonl(path: Path, example: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """The mappings of a ``.jsonl`` file, each with its place ("file, line n"); blank lines are left out.

    Args:
        path: the file.
        example: a line of such a file, for the message where there is none.

    Raises:
        ValueError: if a line is no mapping; it is named.
        FileNotFoundError: if there is no such file.
    """
    if example and not path.exists():
        raise FileNotFoundError(f"no file {path}; expected a line for each item, e.g. {example}")
    rows: list[tuple[str, Mapping[str, Any]]] = []
    # not str.splitlines, which would also part at U+2028 and others that a caption may hold
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
    """What a folder says of its images: rows with "file_name" and "text" (or "prompt"), each with its place.

    They come from ``metadata.jsonl``, or ``metadata.csv``, or else from a ``.txt`` of the same name beside each image
    of the folder and its subfolders, sorted by path.

    Raises:
        ValueError: if there is a ``metadata.jsonl`` and a ``metadata.csv``, or one cannot be read.
        FileNotFoundError: if there is none of the three.
    """
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if lines.exists() and table.exists():
        raise ValueError(f"there are {lines} and {table}; remove one of them")
    if lines.exists():
        return read_jsonl(lines)
    if table.exists():
        return _read_csv(table)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    images = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    captioned = [path for path in images if path.with_suffix(".txt").is_file()]
    if not captioned:
        raise FileNotFoundError(
            f"no file {lines}; it has a line for each image, e.g. "
            '{"file_name": "0001.png", "text": "A red fox."}. A metadata.csv with these columns is read, too, or a '
            f".txt of the same name beside each image, and of the {len(images)} images none has one"
        )
    if len(captioned) < len(images):
        without = len(images) - len(captioned)
        log.warning("%d of %d images in %s have no .txt and are left out", without, len(images), folder)
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
                raise ValueError(f"{where} has more cells than there are columns; quote texts that hold commas")
            rows.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def text_of(row: Mapping[str, Any], where: str) -> str:
    """The text of a row: "text" or "prompt"; null counts as empty."""
    key = next((k for k in ("text", "prompt") if k in row), None)
    if key is None:
        raise ValueError(f"{where} has neither 'text' nor 'prompt'; there is {', '.join(row) or 'nothing'}")
    if row[key] is not None and not isinstance(row[key], str):
        raise ValueError(f"{where}: '{key}' must be text, got {row[key]!r}")
    return check_text(row[key] or "", f"{where}: '{key}'").strip()


def new_index(folder: Path | str, overwrite: bool = False) -> Path:
    """The ``metadata.jsonl`` that a folder is to have.

    Raises:
        ValueError: if it lists images already, of another run or of one that was interrupted, unless they may be
            overwritten.
    """
    check_folder(Path(folder))
    path = Path(folder) / "metadata.jsonl"
    if overwrite:
        if path.exists():
            list(read_jsonl(path))  # what lists the images to replace must be readable
        return path
    count = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if path.exists() else 0
    if count:
        raise ValueError(
            f"{path} lists {count} image{'s' if count > 1 else ''}; choose an empty folder for the new ones, or remove "
            f"{folder} if it is of an interrupted run"
        )
    return path


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError if a seed occurs twice: each image's file is named after its prompt and seed."""
    if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ValueError(f"expected different seeds, got {', '.join(map(str, twice))} more than once")


def remove_listed(index: Path) -> None:
    """Removes a ``metadata.jsonl`` and the images beside it that it lists."""
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


def find_shards(given: str) -> list[Path]:
    """The tar files that a path with ``{0000..0123}`` (both ends included) or with ``*`` stands for, in order.

    Raises:
        FileNotFoundError: if there are none, or at the first one of a range that is missing.
    """
    return list(_shards(given))


def _shards(given: str) -> Iterator[Path]:
    span = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", given)
    if span:
        first, last = span.groups()
        if int(first) > int(last):
            raise FileNotFoundError(f"no shard {given}: {first} is more than {last}")
        for number in range(int(first), int(last) + 1):
            yield from _shards(f"{given[: span.start()]}{number:0{len(first)}d}{given[span.end() :]}")
        return
    paths = sorted(glob(given)) if any(sign in given for sign in "*?[") else [given]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"no shard {missing[0] if missing else given}")
    yield from map(Path, paths)


def missing_shard(given: str) -> str:
    """Which shard of a path is missing, as a message; an empty text if none is."""
    try:
        deque(_shards(given), maxlen=0)
    except FileNotFoundError as error:
        return str(error)
    return ""
