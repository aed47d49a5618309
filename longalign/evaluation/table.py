"""Metric tables: means with intervals and paired differences of several models on the same prompts and seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LENGTH_EDGES = (30, 60, 120, 240)
MIN_PROMPTS = 10
"""Minimum number of prompts for significance; with fewer, bootstrap intervals are too narrow."""
CHUNK = 1_000_000
GROUP_LABELS = {"by_position": "position in the prompt"}
"""Display names of groups of submetrics."""


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval over ``count`` images of ``prompts`` prompts; NaN without values."""

    mean: float
    low: float
    high: float
    count: int
    prompts: int = 0

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero and comes from at least `MIN_PROMPTS` prompts."""
        return self.prompts >= MIN_PROMPTS and (self.low > 0 or self.high < 0)


def bootstrap(
    values: np.ndarray, groups: Sequence[str] | None = None, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of ``values`` with its percentile bootstrap interval. Of differences, this is the paired bootstrap.

    Args:
        values: ``(n,)``; NaN values are skipped.
        groups: one label per value. Groups are resampled instead of values: images of one prompt are not independent,
            so a prompt is resampled with all its images. None resamples single values.
        samples: number of bootstrap samples.
        level: coverage of the interval.
        seed: seed of the resampling; the same values always give the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    valid = ~np.isnan(values)
    if not valid.any():
        return Interval(math.nan, math.nan, math.nan, 0)
    labels = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(labels[valid], weights=values[valid])
    counts = np.bincount(labels[valid])
    sums, counts = sums[counts > 0], counts[counts > 0]
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(sums))
    resampled = (rng.integers(len(sums), size=(min(rows, samples - i), len(sums))) for i in range(0, samples, rows))
    means = np.concatenate([sums[index].sum(1) / counts[index].sum(1) for index in resampled])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values[valid].mean()), float(low), float(high), int(valid.sum()), len(sums))


def length_labels(
    prompts: Sequence[str], edges: Sequence[int] = LENGTH_EDGES, count: Callable[[str], int] | None = None
) -> list[str]:
    """The length bucket of each prompt, e.g. ``"31-60"``. ``count`` measures the length, in words by default."""
    count = count or (lambda text: len(text.split()))
    names = [f"{low + 1}-{high}" for low, high in zip((0, *edges[:-1]), edges, strict=True)] + [f"over {edges[-1]}"]
    return [names[int(np.searchsorted(edges, count(prompt)))] for prompt in prompts]


@dataclass(frozen=True)
class MetricTable:
    """Metric values of several models on the same prompts and seeds. The first model is the base.

    A metric with ``/`` in its name (``facts/colour``) is a submetric of the one before the slash. It is shown in a
    breakdown, not in the main table.

    Attributes:
        values: model -> metric -> ``(n,)`` values, NaN where an image has no value.
        prompts: the ``n`` prompts.
        seeds: the ``n`` seeds.
    """

    values: Mapping[str, Mapping[str, np.ndarray]]
    prompts: Sequence[str]
    seeds: Sequence[int] = field(default=())

    def __post_init__(self):
        for model, metrics in self.values.items():
            for metric, values in metrics.items():
                if np.shape(values) != (len(self.prompts),):
                    raise ValueError(
                        f"'{metric}' of '{model}' has shape {np.shape(values)}; expected one value per prompt, "
                        f"({len(self.prompts)},)"
                    )

    @property
    def models(self) -> list[str]:
        return list(self.values)

    @property
    def base(self) -> str:
        return self.models[0]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The compared pairs ``(model, other)``: each model with the base, then each with the previous one."""
        neighbours = zip(self.models[2:], self.models[1:], strict=False)
        return [*((model, self.base) for model in self.models[1:]), *neighbours]

    @property
    def metrics(self) -> list[str]:
        """The metrics of the main table, in order."""
        return [m for m in dict.fromkeys(m for v in self.values.values() for m in v) if "/" not in m]

    def submetrics(self, metric: str) -> list[str]:
        """The names of a metric's submetrics, e.g. ``facts/colour``."""
        names = dict.fromkeys(m for v in self.values.values() for m in v)
        return [m for m in names if m.startswith(metric + "/")]

    def row(self, model: str, metric: str) -> np.ndarray:
        """The ``(n,)`` values of one model."""
        if model not in self.values or metric not in self.values[model]:
            raise ValueError(
                f"no '{metric}' of '{model}'; available: metrics {', '.join(self.metrics)}, "
                f"models {', '.join(self.models)}"
            )
        return np.asarray(self.values[model][metric], dtype=np.float64)

    def interval(self, model: str, metric: str, rows: np.ndarray | None = None) -> Interval:
        """Mean and 95% interval over all images, or over those selected by the boolean mask ``rows``."""
        return self._bootstrap(self.row(model, metric), rows)

    def difference(self, model: str, metric: str, base: str | None = None, rows: np.ndarray | None = None) -> Interval:
        """Mean paired difference to the model ``base`` (the first one if None), with its 95% interval."""
        return self._bootstrap(self.row(model, metric) - self.row(base or self.base, metric), rows)

    def significant(self, model: str, base: str | None = None) -> tuple[dict[str, Interval], dict[str, Interval]]:
        """The significant paired differences between two models, including submetrics.

        Args:
            model: one of the models.
            base: the model to compare with; the first one if None.

        Returns:
            Gains and losses, each metric -> difference.
        """
        gains: dict[str, Interval] = {}
        losses: dict[str, Interval] = {}
        for metric in self.values[model]:
            if metric in self.values[base or self.base]:
                difference = self.difference(model, metric, base)
                if difference.significant:
                    (gains if difference.mean > 0 else losses)[metric] = difference
        return gains, losses

    def _bootstrap(self, values: np.ndarray, rows: np.ndarray | None) -> Interval:
        rows = np.ones(len(values), dtype=bool) if rows is None else rows
        return bootstrap(values[rows], np.asarray(self.prompts, dtype=object)[rows].tolist())

    def by_group(
        self, metric: str, labels: Sequence[str] | None = None, paired: bool = False
    ) -> dict[str, dict[str, Interval]]:
        """A metric by groups of images: label -> model -> interval.

        Args:
            metric: name of the metric.
            labels: one group label per image; the prompt's length in words if None.
            paired: return the differences of `pairs` instead of the models' values.
        """
        labels = length_labels(self.prompts) if labels is None else labels
        order = _natural_order(labels)
        masks = {name: np.asarray([label == name for label in labels]) for name in order}
        return {name: self._columns(metric, paired, mask) for name, mask in masks.items()}

    def _blocks(self) -> list[tuple[str, list[list[str]]]]:
        """The main table, the differences and the breakdowns, as titled grids of cells."""
        head = ["", *(label(m) for m in self.metrics)]
        main = [head, *([m, *(show(self.interval(m, k), k) for k in self.metrics)] for m in self.models)]
        blocks = [("", main)]
        if len(self.models) > 1:
            rows = [[f"{m} - {other}", *(show_difference(self.difference(m, k, other), k) for k in self.metrics)]
                    for m, other in self.pairs]  # fmt: skip
            too_few = len(set(self.prompts)) < MIN_PROMPTS
            note = f"none marked *: fewer than {MIN_PROMPTS} prompts" if too_few else "* interval excludes zero"
            blocks.append((f"paired differences ({note})", [head, *rows]))
            losses = [[f"{m} - {other}", label(k), show_difference(change, k)]
                      for m, other in self.pairs for k, change in self.significant(m, other)[1].items()]  # fmt: skip
            if losses:
                blocks.append(("significant losses", [["", "metric", "difference"], *losses]))
        # breakdowns are long: show those of metrics with submetrics, else of the first metric
        for metric in [m for m in self.metrics if self.submetrics(m)] or self.metrics[:1]:
            for title, groups in self.breakdowns(metric).items():
                grid = [["", *self.models]]
                grid += [[name, *(show(row[m], metric) for m in self.models)] for name, row in groups.items()]
                blocks.append((title, grid))
            for title, groups in self.breakdowns(metric, paired=True).items():
                grid = [["", *groups]]
                grid += [[pair, *(show_difference(row[pair], metric) for row in groups.values())]
                         for pair in next(iter(groups.values()))]  # fmt: skip
                blocks.append((f"paired differences, {title}", grid))
        return blocks

    def breakdowns(self, metric: str, paired: bool = False) -> dict[str, dict[str, dict[str, Interval]]]:
        """All breakdowns of a metric, by prompt length and by submetrics: title -> label -> model -> interval.

        Submetrics are named ``metric/label`` or ``metric/group/label``. Each group has one title.

        Args:
            metric: name of the metric.
            paired: return the differences of `pairs`, keyed ``"model - other"``, instead of the models' values; empty
                with a single model.
        """
        breakdowns: dict[str, dict[str, dict[str, Interval]]] = {}
        if paired and len(self.models) < 2:
            return breakdowns
        lengths = self.by_group(metric, paired=paired)
        if len(lengths) > 1:
            breakdowns[f"{label(metric)} by length of the prompt in words"] = lengths
        for submetric in self.submetrics(metric):
            *group, name = submetric.split("/")[1:]
            title = f"{label(metric)} by {GROUP_LABELS.get(group[0], group[0]) if group else 'part'}"
            breakdowns.setdefault(title, {})[name] = self._columns(submetric, paired)
        return breakdowns

    def _columns(self, metric: str, paired: bool, rows: np.ndarray | None = None) -> dict[str, Interval]:
        """Model -> interval, or ``"model - other"`` -> interval of the paired difference."""
        if paired:
            return {f"{m} - {other}": self.difference(m, metric, other, rows) for m, other in self.pairs}
        return {m: self.interval(m, metric, rows) for m in self.models}

    def text(self, width: int | None = None) -> str:
        """The table for a terminal.

        Args:
            width: columns of the terminal; wider grids are split into several, stacked vertically. No split if None.
        """
        blocks = [self._caption()]
        for title, grid in self._blocks():
            parts = "\n\n".join(_aligned(part) for part in _split_columns(grid, width))
            blocks.append(f"{title}\n{parts}" if title else parts)
        return "\n\n".join(blocks) + "\n"

    def markdown(self) -> str:
        """The table as Markdown."""
        blocks = [self._caption()]
        for title, grid in self._blocks():
            head, *rows = grid
            lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            blocks.append((f"**{title}**\n\n" if title else "") + "\n".join(lines))
        return "\n\n".join(blocks) + "\n"

    def _caption(self) -> str:
        prompts = len(set(self.prompts))
        images = f", {len(self.prompts)} images per model" if len(self.prompts) != prompts else ""
        return f"{prompts} prompts{images}; mean [95% bootstrap interval]"

    def to_dict(self) -> dict[str, Any]:
        """The table with the values of each image, as plain values for JSON; NaN becomes None."""
        metrics = {m: list(v) for m, v in self.values.items()}
        return {
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "means": {m: {k: _plain(self.interval(m, k)) for k in ks} for m, ks in metrics.items()},
            "differences": {
                f"{m} - {other}": {k: _plain(self.difference(m, k, other)) for k in metrics[m] if k in metrics[other]}
                for m, other in self.pairs
            },
            "significant": {
                f"{m} - {other}": dict(zip(("gains", "losses"), map(list, self.significant(m, other)), strict=True))
                for m, other in self.pairs
            },
            "values": {
                m: {k: [None if math.isnan(x) else float(x) for x in self.row(m, k)] for k in ks}
                for m, ks in metrics.items()
            },
        }

    def json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricTable:
        """The table from the output of `to_dict`."""
        values = {m: {k: np.array([math.nan if x is None else x for x in v]) for k, v in ks.items()}
                  for m, ks in data["values"].items()}  # fmt: skip
        return cls(values, list(data["prompts"]), list(data["seeds"]))


def is_fraction(metric: str) -> bool:
    """Whether a metric is a fraction, shown in percent."""
    return metric.split("/")[0] == "facts"


def label(metric: str) -> str:
    """The display name of a metric."""
    if not is_fraction(metric):
        return metric.replace("_", "-")
    groups = [GROUP_LABELS.get(part, part) for part in metric.split("/")[1:]]
    return "/".join(["fact accuracy", *groups]) + ", %"


def number(value: float, metric: str, sign: bool = False) -> str:
    """Formats one value: percent for fractions, four decimals otherwise."""
    if math.isnan(value):
        return "-"
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if is_fraction(metric) else f"{value:{plus}.4f}"


def show(interval: Interval, metric: str) -> str:
    """Formats an interval: ``mean [low, high]``."""
    if not interval.count:
        return "-"
    return f"{number(interval.mean, metric)} [{number(interval.low, metric)}, {number(interval.high, metric)}]"


def show_difference(interval: Interval, metric: str) -> str:
    """Formats a difference: ``+mean [+low, +high]``, with a star if significant."""
    if not interval.count:
        return "-"
    mean, low, high = (number(v, metric, sign=True) for v in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]" + (" *" if interval.significant else "")


def _plain(interval: Interval) -> dict[str, Any]:
    return {k: None if math.isnan(v) else v for k, v in vars(interval).items()}


def _natural_order(labels: Sequence[str]) -> list[str]:
    """Distinct labels, sorted by leading number; labels without one, such as ``over n``, are last."""

    def key(name: str) -> tuple[int, float, str]:
        digits = name.split("-")[0]
        return (0, float(digits), name) if digits.isdigit() else (1, 0.0, name)

    return sorted(set(labels), key=key)


def _split_columns(grid: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """Splits a grid into grids of at most ``width`` characters where possible; each repeats the first column."""
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


def _widths(grid: list[list[str]]) -> list[int]:
    return [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]


def _aligned(grid: list[list[str]]) -> str:
    widths = _widths(grid)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in grid)
