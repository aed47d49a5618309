"""Unique names, and numbers with their nouns."""

from __future__ import annotations

import itertools
from collections.abc import Container


def unique_name(name: str, taken: Container[str]) -> str:
    """Returns ``name``, or the first of ``name-2``, ``name-3``, ... that is not in ``taken``."""
    return next(c for n in itertools.count(1) if (c := name if n == 1 else f"{name}-{n}") not in taken)


def count(number: int, noun: str) -> str:
    """Returns a number with a noun, in the plural unless the number is 1: ``2 images`` for the noun ``image``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
