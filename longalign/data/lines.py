"""Prompts and captions from text files; importing this module does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def read_jsonl(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The mappings of a ``.jsonl`` file, each with its place ("file, line n"); blank lines are left out."""
    rows: list[tuple[str, Mapping[str, Any]]] = []
    # not str.splitlines, which would also part at U+2028 and others that a caption may hold
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a mapping, got {line.strip()[:80]}")
        rows.append((where, row))
    return rows


def text_of(row: Mapping[str, Any], where: str) -> str:
    """The text of a row: "text" or "prompt"; null counts as empty."""
    key = next((k for k in ("text", "prompt") if k in row), None)
    if key is None:
        raise ValueError(f"{where} has neither 'text' nor 'prompt'; there is {', '.join(row) or 'nothing'}")
    if row[key] is not None and not isinstance(row[key], str):
        raise ValueError(f"{where}: '{key}' must be text, got {row[key]!r}")
    return (row[key] or "").strip()


def new_index(folder: Path | str) -> Path:
    """The ``metadata.jsonl`` that a folder is to have.

    Raises:
        ValueError: if it lists images already, of another run or of one that was interrupted.
    """
    path = Path(folder) / "metadata.jsonl"
    count = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if path.exists() else 0
    if count:
        raise ValueError(
            f"{path} lists {count} images; choose an empty folder for the new ones, or remove {folder} if it is of "
            "an interrupted run"
        )
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
