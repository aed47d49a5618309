"""File formats of prompt sets: the columns of each format, and how rows become prompts. Does not import torch."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longalign.files.lines import text_of
from longalign.segmenters import check_text

log = logging.getLogger(__name__)

PLAIN = "plain"

Row = tuple[str, Mapping[str, Any]]
"""(location, row): "file, line n" for messages, and the row as column or key -> value."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a prompt set.

    Attributes:
        id: identifier of the prompt, unique in the set.
        text: the prompt, without surrounding whitespace.
        labels: labels that group prompts, as name -> labels, e.g. ``{"category": ("Art",)}``. A prompt may have several
            labels of one name.
        pair: identifier that the short and the long version of a prompt have in common; empty if the set has no such
            versions.
        row: entries of the prompt's row in its file from which the files of an official scorer are made; may be empty.
    """

    id: str
    text: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pair: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Format:
    """A file format of a prompt set.

    Attributes:
        name: name of the prompt set.
        columns: columns or keys that each row must have.
        prompts: function (rows of a file, name of the file without suffix) -> prompts.
        detected: whether a file with these columns has this format if the user names no prompt set.
    """

    name: str
    columns: tuple[str, ...]
    prompts: Callable[[Sequence[Row], str], Iterable[Prompt]]
    detected: bool = True

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Returns whether a row has all ``columns``."""
        return set(self.columns) <= set(row)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: '{key}' must be a non-empty text, got {value!r:.80}; correct this row")
    return check_text(value, f"{where}: '{key}'").strip()


def _cell(row: Mapping[str, Any], key: str, where: str) -> str:
    """Returns the value of ``key``, a text or a whole number, as text. Raises ValueError if it is neither."""
    value = row[key]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(row, key, where)


def _labels(**values: Any) -> dict[str, tuple[str, ...]]:
    """Returns name -> labels without duplicates.

    A value is a text or a list. Elements that are not texts, and empty texts, are dropped; so are names without labels.
    """
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in values.items()}
    texts = {name: [v.strip() for v in value if isinstance(v, str)] for name, value in lists.items()}
    return {name: tuple(dict.fromkeys(v for v in value if v)) for name, value in texts.items() if any(value)}


def _plain(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    for i, (where, row) in enumerate(rows):
        id, labels = row.get("id"), row.get("labels")
        grouped = _labels(**labels) if isinstance(labels, dict) else {}
        yield Prompt(str(i) if id is None else _cell(row, "id", where), text_of(row, where), grouped, row=row)


def _questions(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    """Yields the prompts of DPG-Bench and DSG, whose files have one row for each question about an image."""
    by_id: dict[str, list[Row]] = {}
    for where, row in rows:
        by_id.setdefault(_cell(row, "item_id", where), []).append((where, row))
    for id, items in by_id.items():
        broad = [row["category_broad"] for _, row in items]
        detailed = [row["category_detailed"] for _, row in items]
        where, row = items[0]
        yield Prompt(id, _text(row, "text", where), _labels(category=broad, subcategory=detailed))


def _dsg(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    for prompt in _questions(rows, stem):
        source, underscore, number = prompt.id.rpartition("_")  # e.g. whoops_5
        labels = _labels(source=source) if underscore and number.isdigit() else {}
        yield Prompt(prompt.id, prompt.text, {**labels, **prompt.labels})


def _unigenbench(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    length = "long" if stem.endswith("_long") else "short"
    for where, row in rows:
        index = _cell(row, "index", where)
        try:
            keys = json.loads(row["sub_dims_en"])
            points = [str(point) for point in keys["Testpoints"]]
        except (ValueError, TypeError, KeyError) as error:  # as in line 511 of the published long prompts
            log.warning(
                "%s: 'sub_dims_en' is not JSON with 'Testpoints', so 'length' is the prompt's only label: %s",
                where,
                error,
            )
            keys, points = {}, []
        labels = _labels(
            length=length,
            category=keys.get("Primary Categories"),
            subcategory=keys.get("Secondary Categories"),
            subject=keys.get("Subjects"),
            dimension=[point.split(" - ")[0] for point in points],
            testpoint=points,
        )
        yield Prompt(f"{length}/{index}", _text(row, "prompt_en", where), labels, pair=index, row=row)


def _longbench(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    for i, (where, row) in enumerate(rows):
        yield Prompt(str(i), _text(row, "instruction", where), row=row)


def _detailmaster(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    for where, row in rows:
        source = _text(row, "dataset_target", where)
        labels = _labels(source=source, target=row.get("mini_bench_target"))
        id = f"{source}_{_cell(row, 'image_id', where)}"
        yield Prompt(id, _text(row, "polished_prompt", where), labels, row=row)


def _tiif(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    for i, (where, row) in enumerate(rows):
        kind = _text(row, "type", where)
        for length in ("short", "long"):
            text = _text(row, f"{length}_description", where)
            # the scorer counts the lines of each file
            labels, pair = _labels(type=kind, length=length), f"{kind}/{i}"
            yield Prompt(f"{pair}/{length}", text, labels, pair=pair, row={"type": kind, "index": i, "length": length})


def _geneval(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    for i, (where, row) in enumerate(rows):
        yield Prompt(f"{i:05d}", _text(row, "prompt", where), _labels(tag=row["tag"]), row=row)


def _oneig(rows: Sequence[Row], stem: str) -> Iterable[Prompt]:
    for where, row in rows:
        category = _text(row, "category", where)
        labels = _labels(
            category=category,
            type=re.split(r"\s*,\s*", row.get("type") or ""),
            length=row.get("prompt_length"),
            style=None if row.get("class") == "None" else row.get("class"),
        )
        yield Prompt(f"{category}/{_cell(row, 'id', where)}", _text(row, "prompt_en", where), labels, row=row)


_QUESTIONS = ("item_id", "text", "proposition_id", "category_broad", "category_detailed")

FORMATS = (
    Format(PLAIN, ("prompt",), _plain),
    Format(PLAIN, ("text",), _plain),
    Format("dpg-bench", _QUESTIONS, _questions),
    Format("dpg-bench", ("id", "prompt"), _plain, detected=False),
    Format("dsg", _QUESTIONS, _dsg),
    Format("unigenbench", ("index", "prompt_en", "sub_dims_en"), _unigenbench),
    Format("longbench-t2i", ("instruction", "label"), _longbench),
    Format("detailmaster", ("image_id", "polished_prompt", "dataset_target"), _detailmaster),
    Format("tiif", ("type", "short_description", "long_description"), _tiif),
    Format("geneval", ("tag", "include", "prompt"), _geneval),
    Format("oneig", ("category", "id", "prompt_en"), _oneig),
)
SETS = tuple(dict.fromkeys(form.name for form in FORMATS))
"""Names of the prompt sets, which are the values of `Format.name`."""
