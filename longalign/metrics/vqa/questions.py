"""Reads yes/no questions about prompts from csv files, and scores the answers. Does not import torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign.files.lines import read_csv

log = logging.getLogger(__name__)

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """A yes/no question about images of one prompt.

    Attributes:
        number: number of the question, unique among the questions of its prompt.
        text: the question.
        category: what the question asks about, e.g. ``attribute``.
        parents: numbers of the questions that must also be answered with yes for this question to hold.
    """

    number: int
    text: str
    category: str
    parents: tuple[int, ...] = ()


def read_questions(path: Path | str, official: bool = False) -> dict[str, tuple[Question, ...]]:
    """Reads the questions of each prompt from a csv file in the layout of DSG-1k and DPG-Bench.

    If prompts of different ``item_id`` are equal, the questions of the first are used. Parents that are not questions
    of their prompt, as in DSG-1k, are reported in one warning.

    Args:
        path: path of the csv file, with the columns `COLUMNS`.
        official: whether to drop the first question of the file, as DPG-Bench's script does.

    Returns:
        Prompt, with single spaces as by `normalize` -> its questions in the order of the file.

    Raises:
        ValueError: if a column or value is missing, or the number of a question (``proposition_id``) is not an integer
            or not unique in its prompt.
        FileNotFoundError: if the file does not exist.
    """
    rows = read_csv(Path(path))
    if not rows:
        raise ValueError(f"{path} contains no questions; add rows with the columns {', '.join(COLUMNS)}")
    items: dict[str, str] = {}
    questions: dict[str, dict[int, Question]] = {}
    for where, row in rows[1:] if official else rows:
        values = {column: _value(row, column, where) for column in COLUMNS}
        prompt = normalize(values["text"])
        if items.setdefault(prompt, values["item_id"]) != values["item_id"]:
            continue
        number = values["proposition_id"]
        if not number.isdecimal():
            raise ValueError(f"{where}: expected an integer as proposition_id, got {number!r}; correct this value")
        parents = [int(p) for p in map(str.strip, values["dependency"].split(",")) if p.isdecimal()]
        question = Question(
            int(number), values["question_natural_language"], values["category_broad"], tuple(p for p in parents if p)
        )
        if question.number in questions.setdefault(prompt, {}):
            raise ValueError(f"{where}: item {values['item_id']} has two questions {number}; renumber one of them")
        questions[prompt][question.number] = question
    unknown = sum(p not in by_number for by_number in questions.values() for q in by_number.values() for p in q.parents)
    if unknown:
        effect = "images whose score depends on them have no score" if official else "they are ignored"
        log.warning("%s: %d dependencies refer to no question of their prompt; %s", path, unknown, effect)
    return {prompt: tuple(by_number.values()) for prompt, by_number in questions.items()}


def normalize(prompt: str) -> str:
    """Returns a prompt with all whitespace replaced by single spaces, as in the keys of `read_questions`."""
    return " ".join(prompt.split())


def vqa_score(questions: Sequence[Question], yes: Mapping[int, bool], official: bool = False) -> float:
    """Returns the share of questions that hold, in [0, 1]; NaN if there are no questions.

    A question holds if it and all questions that it depends on, directly or through others, are answered with yes.
    Parents that are not among the questions are ignored.

    Args:
        questions: the questions of one prompt.
        yes: question number -> whether the question is answered with yes, for all questions.
        official: whether to reproduce DPG-Bench's script. It evaluates the questions only once, in the order of
            ``questions``, and gives no score (NaN) if a parent is not among the questions.
    """
    holds = dict(yes)
    changed = True
    while changed:
        before = dict(holds)
        for question in questions:
            for parent in question.parents:
                if parent not in holds:
                    if official:
                        return math.nan
                elif not holds[parent]:
                    holds[question.number] = False
                    break
        changed = holds != before and not official
    return sum(holds.values()) / len(holds) if holds else math.nan


def _value(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(f"{where}: no column '{column}'; expected {', '.join(COLUMNS)}, got {', '.join(row)}")
    value = (row[column] or "").strip()
    if not value:
        raise ValueError(f"{where}: '{column}' is empty; fill it in or remove the line")
    return value
