"""Unique names, numbers with their nouns, and the order of labels with numbers."""

from __future__ import annotations

import itertools
from collections.abc import Container


def unique_name(name: str, taken: Container[str]) -> str:
    """Returns ``name``, or the first of ``name-2``, ``name-3``, ... that is not in ``taken``."""
    return next(c for n in itertools.count(1) if (c := name if n == 1 else f"{name}-{n}") not in taken)


def count(number: int, noun: str) -> str:
    """Returns a number with a noun, in the plural unless the number is 1: ``2 images`` for the noun ``image``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def natural_key(label: str) -> tuple[int, int, str]:
    """Returns a sort key that orders labels such as "31-60" by their first number. Other labels are last, by text."""
    digits = label.split("-")[0]
    return (0, int(digits), label) if digits.isdecimal() else (1, 0, label)
