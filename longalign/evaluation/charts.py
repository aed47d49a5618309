"""Draws small SVG charts: curves over steps, and means with intervals. The page's CSS sets the colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from longalign.evaluation.bootstrap import Interval

WIDTH = 400
"""Width of a chart, in units of its SVG view box."""
COLORS = 8
"""Number of colours in the page's CSS; further models and lines repeat them."""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns about ``count`` round numbers from ``low`` to ``high``, spaced by 1, 2 or 5 times a power of ten.

    If ``high`` is not above ``low``, or one of them is not finite, only ``low`` is returned.
    """
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Returns the centred moving mean over ``window`` values, or over one more if ``window`` is even.

    At the ends, the values that do not exist are omitted.
    """
    half = window // 2
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        means.append(sum(near) / len(near))
    return means


def curves(
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    height: int = 190,
    x_title: str = "step",
    mark: float | None = None,
) -> str:
    """Returns a chart of curves over steps as HTML. Thin lines are the values, thick lines their moving means.

    Non-finite values are skipped. Without finite values the chart shows "no values".

    Args:
        title: caption of the chart.
        lines: name -> (steps, values). The names are shown if there are several.
        height: height of the chart, in the units of `WIDTH`.
        x_title: title of the x axis.
        mark: step at which a dashed vertical line is drawn; None for no line.
    """
    finite = {
        name: [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
        for name, (steps, values) in lines.items()
    }
    points = [point for line in finite.values() for point in line]
    if not points:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p>no values</p></figure>'
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad
    left, right, top, bottom = 52, 12, 8, 36
    x_of = _scale(min(xs), max(xs), left, WIDTH - right)
    y_of = _scale(low, high, height - bottom, top)
    parts = []
    for y in ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_short(y)}</text>')
    parts += [
        f'<text x="{x_of(x):.1f}" y="{height - 20}" text-anchor="middle">{_short(x)}</text>'
        for x in ticks(min(xs), max(xs), 5)
    ]
    parts.append(f'<text x="{(left + WIDTH - right) / 2}" y="{height - 4}" text-anchor="middle">{x_title}</text>')
    if mark is not None and min(xs) <= mark <= max(xs):
        x = f"{x_of(mark):.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}"/>')
    legend, spoken = "", []
    for i, (name, line) in enumerate(finite.items()):
        if not line:
            continue
        number = (i + 1) % COLORS  # color 0, of the base model, is grey
        color, steps, values = f"line-{number}", [p[0] for p in line], [p[1] for p in line]
        parts.append(f'<polyline class="raw {color}" points="{_points(steps, values, x_of, y_of)}"/>')
        means = smooth(values, max(1, len(values) // 12))
        parts.append(f'<polyline class="mean {color}" points="{_points(steps, means, x_of, y_of)}"/>')
        spoken.append(f"{name} from {_short(values[0])} to {_short(values[-1])}")
        if len(finite) > 1:
            legend += f' <span class="key"><span class="dot model-{number}"></span>{escape(name)}</span>'
    return _figure(title, parts, height, legend, f"{title}: {', '.join(spoken)}")


def intervals(
    title: str,
    rows: Mapping[str, Mapping[str, Interval]],
    number: Callable[[float], str],
    limits: tuple[float, float] | None = None,
) -> str:
    """Returns a chart of means with intervals as HTML: for each label a row, with one line per model.

    Args:
        title: caption of the chart.
        rows: label -> name of a model -> interval; intervals without values are skipped. All rows have the same models
            in the same order.
        number: function that formats a value as text.
        limits: values at the ends of the x axis; None for the lowest and highest end of the intervals.
    """
    non_empty = [v for row in rows.values() for v in row.values() if v.count]
    if not non_empty:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p>no values</p></figure>'
    low, high = limits or (min(v.low for v in non_empty), max(v.high for v in non_empty))
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    lines = max(len(row) for row in rows.values())
    left = min(180, 16 + 7 * max(len(label) for label in rows))
    row_height, bottom = 11 * lines + 11, 22
    height = row_height * len(rows) + bottom
    x_of = _scale(low - pad, high + pad, left, WIDTH - 16)
    parts = []
    for x in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="2" y2="{height - bottom}"/>')
        parts.append(
            f'<text x="{x_of(x):.1f}" y="{height - 6}" text-anchor="middle">{number(x).removesuffix(".0")}</text>'
        )
    for i, (label, row) in enumerate(rows.items()):
        middle = i * row_height + row_height / 2
        parts.append(f'<text x="{left - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for j, (model, value) in enumerate(row.items()):
            if not value.count:
                continue
            y = middle + (j - (len(row) - 1) / 2) * 11
            title_text = f"{escape(model)}: {number(value.mean)} [{number(value.low)}, {number(value.high)}]"
            parts.append(
                f'<g class="model-{j % COLORS}"><title>{title_text}</title>'
                f'<line x1="{x_of(value.low):.1f}" x2="{x_of(value.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<circle cx="{x_of(value.mean):.1f}" cy="{y:.1f}" r="4"/></g>'
            )
    return _figure(title, parts, height)


def _figure(title: str, parts: Sequence[str], height: float, legend: str = "", spoken: str = "") -> str:
    label = escape(spoken or title)
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{escape(title)}{legend}</figcaption>{svg}</figure>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _points(
    xs: Sequence[float], ys: Sequence[float], x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> str:
    return " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _short(value: float) -> str:
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}"
