"""Formats metrics as text: names, numbers, intervals, and tables for a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longalign.evaluation.bootstrap import Interval
from longalign.metrics.base import Value

LABELS = {"facts": "fact accuracy", "by_position": "position in the prompt"}
"""Display names of parts of metric names."""
Grid = list[list[str]]
"""A table as rows of cells; the first row has the names of the columns."""


def label(metric: str, value: Value) -> str:
    """Returns the display name of a metric, with the unit of ``value``, and with a note if lower is better."""
    name = "/".join(LABELS.get(part, part) for part in metric.split("/")).replace("_", "-")
    return (
        name + (f", {value.unit}" if value.unit else "") + (" (lower is better)" if value.direction == "lower" else "")
    )


def number(amount: float, value: Value, sign: bool = False) -> str:
    """Formats a number of a metric as text.

    Args:
        amount: the number. If the unit is ``%``, it is a fraction that is shown in percent, 0.25 as ``25.0``; otherwise
            four decimals are shown. NaN is shown as ``-``.
        value: unit of the metric.
        sign: whether positive numbers start with ``+``.
    """
    if math.isnan(amount):
        return "-"
    plus = "+" if sign else ""
    return f"{100 * amount:{plus}.1f}" if value.unit == "%" else f"{amount:{plus}.4f}"


def interval_text(interval: Interval, value: Value, sign: bool = False, unit: str = "") -> str:
    """Formats an interval as ``mean [low, high]``.

    Args:
        interval: the interval.
        value: unit of the metric.
        sign: whether positive numbers start with ``+``.
        unit: text directly after the mean, e.g. ``%``.
    """
    mean, low, high = (number(v, value, sign) for v in (interval.mean, interval.low, interval.high))
    return f"{mean}{unit} [{low}, {high}]"


def show(interval: Interval, value: Value) -> str:
    """Formats an interval as ``mean [low, high]``. An interval without values becomes ``-``.

    ``value`` is as for `number`.
    """
    return interval_text(interval, value) if interval.count else "-"


def show_difference(interval: Interval, value: Value) -> str:
    """Formats the interval of a difference as ``+mean [+low, +high]``, with a star if the difference is significant.

    An interval without values becomes ``-``. ``value`` is as for `number`.
    """
    if not interval.count:
        return "-"
    return interval_text(interval, value, sign=True) + (" *" if interval.significant else "")


def terminal_text(blocks: Sequence[tuple[str, Grid]], caption: str, width: int | None = None) -> str:
    """Formats titled tables for a terminal.

    Args:
        blocks: (title, table) of each table; a title may be empty.
        caption: text before the tables.
        width: characters per line. Wider tables are split into several with fewer columns. None does not split.
    """
    texts = [caption]
    for title, grid in blocks:
        parts = "\n\n".join(_aligned(part) for part in _split_columns(grid, width))
        texts.append(f"{title}\n{parts}" if title else parts)
    return "\n\n".join(texts) + "\n"


def markdown_text(blocks: Sequence[tuple[str, Grid]], caption: str) -> str:
    """Formats titled tables in Markdown. The arguments are as for `terminal_text`."""
    texts = [caption]
    for title, grid in blocks:
        head, *rows = grid
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        texts.append((f"**{title}**\n\n" if title else "") + "\n".join(lines))
    return "\n\n".join(texts) + "\n"


def _split_columns(grid: Grid, width: int | None) -> list[Grid]:
    """Splits a table into tables with fewer columns, each of at most ``width`` characters per line where possible.

    Each table repeats the first column. If ``width`` is None, the table is not split.
    """
    label_width, *widths = _widths(grid)
    parts: list[list[int]] = [[]]
    used = label_width
    for i, size in enumerate(widths, start=1):
        if width is not None and parts[-1] and used + 2 + size > width:
            parts.append([])
            used = label_width
        parts[-1].append(i)
        used += 2 + size
    return [[[row[i] for i in (0, *columns)] for row in grid] for columns in parts]


def _widths(grid: Grid) -> list[int]:
    return [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]


def _aligned(grid: Grid) -> str:
    widths = _widths(grid)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in grid)
