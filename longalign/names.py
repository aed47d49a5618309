"""Generates unique names."""

from __future__ import annotations

from collections.abc import Container
from itertools import count


def unique_name(name: str, taken: Container[str]) -> str:
    """Returns ``name``, or the first of ``name-2``, ``name-3``, ... that is not in ``taken``."""
    return next(c for n in count(1) if (c := name if n == 1 else f"{name}-{n}") not in taken)
