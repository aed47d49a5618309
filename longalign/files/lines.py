"""Reads prompts and rows from .txt, .jsonl and .csv files. Importing this module does not import torch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from longalign.segmenters import check_text

#: what happens to empty captions and prompts, by the config key ``empty``, for messages
OUTCOMES = {"skip": "skipped", "keep": "kept"}


def inside(folder: Path | str, name: str, where: str = "") -> Path:
    """Returns the path of the file ``name`` in a folder, without checking that the file exists.

    File names in data are untrusted, so ``..`` and absolute paths must not lead out of the folder. Symbolic links are
    followed: they were created by the owner of the folder, and the Hub cache consists of them.

    Args:
        folder: the folder.
        name: path relative to the folder, or an absolute path inside it.
        where: location of the name in the data, e.g. "a.jsonl, line 3", at the start of the error message.

    Raises:
        ValueError: if the path is outside the folder.
    """
    if ".." not in name and not os.path.isabs(name):
        return Path(folder) / name
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        prefix = f"{where}: " if where else ""
        raise ValueError(f"{prefix}{name!r:.200} is outside {folder}; expected a path of a file in this folder")
    return Path(folder) / os.path.relpath(path, root)


def read_prompts(path: Path | str) -> list[str]:
    """Reads the prompts of a file, empty prompts included, without surrounding whitespace.

    Args:
        path: a ``.txt`` file with one prompt per line, or a ``.jsonl`` file with "text" or "prompt" in each line.

    Raises:
        ValueError: if the file has a different suffix, or a ``.jsonl`` line has neither key; the message contains the
            line number.
        FileNotFoundError: if the file does not exist.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return [text_of(row, where) for where, row in read_jsonl(path)]
    if path.suffix != ".txt":
        raise ValueError(f"expected a .txt or .jsonl file of prompts, got {path}; convert the file")
    lines = read_text(path).split("\n")
    return [line.strip() for line in (lines[:-1] if not lines[-1] else lines)]


def read_jsonl(path: Path, example: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Returns (location, mapping) of each line of a ``.jsonl`` file. A location is "file, line n", for messages.

    Empty lines are skipped.

    Args:
        path: the file.
        example: a valid line, shown in the message if the file does not exist.

    Raises:
        ValueError: if a line is not a JSON mapping; the message contains the line number.
        FileNotFoundError: if the file does not exist.
    """
    if example and not path.exists():
        raise FileNotFoundError(f"no file {path}; create it with one JSON object per line, e.g. {example}")
    rows: list[tuple[str, Mapping[str, Any]]] = []
    # not str.splitlines, which also splits at U+2028 and other characters that captions contain
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}; expected one JSON mapping per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON mapping, got {line.strip()[:80]}")
        rows.append((where, row))
    return rows


def read_csv(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns (location, row) of each row of a ``.csv`` file whose first line has the column names.

    A location is "file, line n", for messages. A row maps column names to texts.

    Raises:
        ValueError: if the file is not CSV, or a row has more cells than there are columns.
        FileNotFoundError: if the file does not exist.
    """
    rows: list[tuple[str, Mapping[str, Any]]] = []
    reader = csv.DictReader(StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{where} has more cells than columns; quote texts that contain commas")
            rows.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}; correct this line") from error
    return rows


def text_of(row: Mapping[str, Any], where: str) -> str:
    """Returns the text of a row, without surrounding whitespace: the value of "text", or of "prompt" without "text".

    A value of None becomes an empty text.


    Raises:
        ValueError: if the row has neither key, or the value is not a string. The message starts with ``where``, the
            location of the row.
    """
    key = next((k for k in ("text", "prompt") if k in row), None)
    if key is None:
        raise ValueError(
            f"{where} has neither 'text' nor 'prompt'; available: {', '.join(row) or 'nothing'}. Add one of them"
        )
    if row[key] is not None and not isinstance(row[key], str):
        raise ValueError(f"{where}: '{key}' must be a string, got {row[key]!r}; put a text in quotes")
    return check_text(row[key] or "", f"{where}: '{key}'").strip()


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file. Raises ValueError if it is not UTF-8, FileNotFoundError if it is missing."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}; check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; save the file as UTF-8") from error
