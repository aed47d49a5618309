"""Reads prompt sets of benchmarks with ids and labels. Importing this module does not import torch."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.data.prompts.formats import FORMATS, SETS, Format, Prompt, Row
from longalign.errors import suggestion
from longalign.files.lines import read_csv, read_jsonl, read_prompts, read_text

SUFFIXES = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a benchmark, or of any file of prompts.

    Attributes:
        name: name of the set, one of `longalign.data.prompts.formats.SETS`; "plain" for files of no benchmark.
        prompts: the prompts in the order in which they are stored.
    """

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def texts(self) -> list[str]:
        """The text of each prompt."""
        return [prompt.text for prompt in self.prompts]


def prompts_hash(texts: Iterable[str]) -> str:
    """Returns the SHA-256 hash of the `normalized` texts in their order, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps([normalized(text) for text in texts]).encode()).hexdigest()


def normalized(text: str) -> str:
    """Returns a text in Unicode form NFC. Each run of whitespace becomes one space; none remains at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_prompt_set(source: str | Path) -> PromptSet:
    """Reads a prompt set, such as the prompts of a benchmark.

    Args:
        source: ``PATH`` or ``NAME:PATH``, with a name of `longalign.data.prompts.formats.SETS`. Without a name, the
            columns of the files select the set. ``PATH`` is one of three: a ``.csv``, ``.json`` or ``.jsonl`` file, or
            a ``.txt`` file with one prompt per line; a folder of ``.csv``, ``.json`` and ``.jsonl`` files, read in the
            order of their names; a folder with one ``.txt`` file for each prompt (DPG-Bench).

    Raises:
        ValueError: if a file lacks a column of the set, a file has the columns of several sets, there are no prompts,
            or an id occurs twice.
        FileNotFoundError: if the path does not exist.
    """
    name, path = _split_source(str(source))
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    parts = [_prompts_of_file(file, name) for file in files] or [("dpg-bench", _prompts_of_texts(path, name))]
    if len(names := dict.fromkeys(found for found, _ in parts)) > 1:
        raise ValueError(
            f"{path} contains several prompt sets: {', '.join(names)}; give a file, or a folder with one set"
        )
    prompts = tuple(prompt for _, part in parts for prompt in part)
    if not prompts:
        raise ValueError(f"{path} contains no prompts; expected at least one")
    if repeated := [id for id, count in Counter(prompt.id for prompt in prompts).items() if count > 1]:
        raise ValueError(f"{path}: the id {repeated[0]!r} occurs more than once; expected one prompt for each id")
    return PromptSet(parts[0][0], prompts)


def _split_source(source: str) -> tuple[str | None, Path]:
    name, colon, rest = source.partition(":")
    named = bool(colon) and name in SETS
    path = Path(rest if named else source)
    if not path.exists():
        hint = "; check the path"
        if colon and not named and len(name) > 1:  # one letter is a drive of Windows
            hint = f"; no prompt set '{name}'" + (suggestion(name, SETS) or f", available: {', '.join(SETS)}")
        raise FileNotFoundError(f"no file {path}{hint}")
    return (name if named else None), path


def _prompts_of_texts(folder: Path, name: str | None) -> list[Prompt]:
    """Reads a folder with one ``.txt`` file for each prompt. The file names without suffix are the ids."""
    files = sorted(folder.glob("*.txt"))
    if not files or name not in (None, "dpg-bench"):
        expected = "" if name not in (None, "dpg-bench") else ", or .txt files"
        raise ValueError(
            f"{folder} contains no {', '.join(SUFFIXES)} files{expected}; give a folder with the files of a prompt set"
        )
    return [Prompt(file.stem, read_text(file).strip()) for file in files]


def _prompts_of_file(path: Path, name: str | None) -> tuple[str, list[Prompt]]:
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} contains no prompts; expected at least one")
    form = _format_of(path, rows[0], name)
    forms = [other for other in FORMATS if (other.name, other.prompts) == (form.name, form.prompts)]
    for where, row in rows:
        _check_columns(where, row, forms)
    return form.name, list(form.prompts(rows, path.stem))


def _rows(path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return read_csv(path)
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix == ".txt":
        return [(f"{path}, line {i}", {"prompt": text}) for i, text in enumerate(read_prompts(path), 1)]
    if suffix != ".json":
        raise ValueError(f"expected a file of prompts with the suffix .txt, {', '.join(SUFFIXES)}, got {path}")
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; expected a list of mappings") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON list of mappings, got {rows!r:.80}")
    return [(f"{path}, item {i}", row) for i, row in enumerate(rows)]


def _check_columns(where: str, row: Mapping[str, Any], forms: list[Format]) -> None:
    if not any(form.fits(row) for form in forms):
        expected = " or ".join(f"{', '.join(form.columns)} ({form.name})" for form in forms)
        raise ValueError(f"{where}: expected the columns {expected}; found {', '.join(map(str, row)) or 'none'}")


def _format_of(path: Path, first: Row, name: str | None) -> Format:
    """Returns the format of a file, given its first row. If several formats match, the one with most columns is used.

    Raises:
        ValueError: if no format matches, or formats of several prompt sets do.
    """
    forms = [form for form in FORMATS if (form.name == name if name else form.detected)]
    _check_columns(*first, forms)
    fitting = [form for form in forms if form.fits(first[1])]
    most = max(len(form.columns) for form in fitting)
    best = {form.name: form for form in reversed(fitting) if len(form.columns) == most}
    if len(best) > 1:
        sources = " or ".join(f"{name}:{path}" for name in best)
        raise ValueError(f"{path} has the columns of {len(best)} prompt sets; give the prompts as {sources}")
    return next(iter(best.values()))
