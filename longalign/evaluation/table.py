"""Metric tables: means with intervals and paired differences of several models on the same prompts and noise seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from longalign.evaluation.bootstrap import EMPTY, MIN_PROMPTS, Interval, bootstrap, interval
from longalign.evaluation.formatting import (
    LABELS,
    Grid,
    label,
    markdown_text,
    show,
    show_difference,
    terminal_text,
)
from longalign.evaluation.groups import length_labels
from longalign.metrics.base import Value, value_of
from longalign.names import count, natural_key


@dataclass(frozen=True)
class MetricTable:
    """Metric values of several models on the same prompts and noise seeds. The first model is the base of comparisons.

    Each model has ``n`` images; the i-th image has the i-th prompt and seed. A metric with ``/`` in its name
    (``facts/colour``) is a submetric of the metric before the slash. Submetrics are not shown in the main table, but in
    breakdowns: tables of one metric by groups of images or by submetrics.

    Attributes:
        values: name of a model -> name of a metric -> ``(n,)`` values, NaN where an image has no value.
        prompts: the ``n`` prompts; a prompt may occur with several seeds.
        seeds: the ``n`` noise seeds; empty if unknown.
        units: name of a metric -> its unit, and whether higher or lower is better; see `longalign.metrics.Value`.
        sets: metrics with one value for all images of a model instead of one per image, such as a Frechet distance:
            name of a model -> name of a metric -> ``(1 + samples,)``. The first number is the value of all images, the
            others are those of bootstrap samples, which are the same for all models.
        training_seeds: the training seed of each of the ``n`` images, if a model was trained several times; intervals
            then resample training seeds too. Empty for models that were trained once.
        neighbours: whether each model is also compared with the previous one, not only with the first one.
        note: sentence that is added to the text above the tables; empty for none.
        labels: labels that group prompts: name, such as ``category``, -> the labels of each of the ``n`` prompts. A
            prompt belongs to the group of each of its labels.

    Raises:
        ValueError: if ``values`` has an array of a shape other than ``(n,)``.
    """

    values: Mapping[str, Mapping[str, np.ndarray]]
    prompts: Sequence[str]
    seeds: Sequence[int] = field(default=())
    units: Mapping[str, Value] = field(default_factory=dict)
    sets: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    training_seeds: Sequence[int] = field(default=())
    neighbours: bool = True
    note: str = ""
    labels: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    def __post_init__(self):
        for model, metrics in self.values.items():
            for metric, values in metrics.items():
                if np.shape(values) != (len(self.prompts),):
                    raise ValueError(
                        f"'{metric}' of '{model}' has shape {np.shape(values)}; expected one value for each of the "
                        f"{len(self.prompts)} prompts, ({len(self.prompts)},)"
                    )

    @property
    def models(self) -> list[str]:
        return list(self.values)

    @property
    def num_prompts(self) -> int:
        """Number of distinct prompts."""
        return len(set(self.prompts))

    @property
    def base(self) -> str:
        return self.models[0]

    @property
    def steps(self) -> list[tuple[str, str]]:
        """A pair (model, other) for each model but the first.

        The other model is the previous one if ``neighbours`` is True, and the first one if it is False.
        """
        others = self.models if self.neighbours else [self.base] * len(self.models)
        return list(zip(self.models[1:], others, strict=False))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The compared pairs (model, other): each later model with the first one, then the other `steps`."""
        return list(dict.fromkeys([*((model, self.base) for model in self.models[1:]), *self.steps]))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in the main table, i.e. without submetrics, in order."""
        rows = [*self.values.values(), *self.sets.values()]
        return [m for m in dict.fromkeys(m for row in rows for m in row) if "/" not in m]

    def submetrics(self, metric: str) -> list[str]:
        """Returns the names of a metric's submetrics, e.g. ``facts/colour``."""
        rows = [*self.values.values(), *self.sets.values()]
        return [m for m in dict.fromkeys(m for row in rows for m in row) if m.startswith(metric + "/")]

    def value(self, metric: str) -> Value:
        """Returns the `Value` of a metric or submetric: its unit, and whether higher or lower is better."""
        return value_of(metric, self.units)

    def label(self, metric: str) -> str:
        """Returns the display name of a metric, with its unit, and with a note if lower is better."""
        return label(metric, self.value(metric))

    def row(self, model: str, metric: str) -> np.ndarray:
        """Returns the values ``(n,)`` of a metric for one model. Raises ValueError if the table has none."""
        if model not in self.values or metric not in self.values[model]:
            raise ValueError(
                f"no metric '{metric}' of '{model}'; available: metrics {', '.join(self.metrics)}, "
                f"models {', '.join(self.models)}"
            )
        return np.asarray(self.values[model][metric], dtype=np.float64)

    def interval(self, model: str, metric: str, rows: np.ndarray | None = None) -> Interval:
        """Returns the mean of a metric for one model, with its 95% bootstrap interval.

        Args:
            model: name of the model.
            metric: name of the metric.
            rows: boolean mask ``(n,)`` of the images to use; None uses all. With a mask, the interval of a metric that
                only a set of images has (see the attribute ``sets``) is NaN.

        Raises:
            ValueError: if the table has no values of the metric for the model.
        """
        if metric in self.sets.get(model, {}):
            return self._set_interval(self.sets[model][metric], rows)
        return self._bootstrap((model, metric), self.row(model, metric), rows)

    def difference(self, model: str, metric: str, base: str | None = None, rows: np.ndarray | None = None) -> Interval:
        """Returns the mean paired difference of a metric between two models, with its 95% bootstrap interval.

        Args:
            model: name of the model.
            metric: name of the metric.
            base: name of the model whose values are subtracted; None for the first model.
            rows: as for `interval`.

        Raises:
            ValueError: if one of the models has no values of the metric.
        """
        base = base or self.base
        if metric in self.sets.get(model, {}) and metric in self.sets.get(base, {}):
            return self._set_interval(self.sets[model][metric] - self.sets[base][metric], rows)
        return self._bootstrap((model, metric, base), self.row(model, metric) - self.row(base, metric), rows)

    def significant(self, model: str, base: str | None = None) -> tuple[dict[str, Interval], dict[str, Interval]]:
        """Returns the significant paired differences between two models, including those of submetrics.

        Metrics for which neither higher nor lower is better (gauges) are omitted.

        Args:
            model: name of the model.
            base: name of the model to compare with; None for the first model.

        Returns:
            The gains, then the losses, each as name of a metric -> difference.
        """
        gains: dict[str, Interval] = {}
        losses: dict[str, Interval] = {}
        for metric in self._shared(model, base or self.base):
            difference = self.difference(model, metric, base)
            if difference.significant and (is_gain := self.is_gain(metric, difference)) is not None:
                (gains if is_gain else losses)[metric] = difference
        return gains, losses

    def is_gain(self, metric: str, difference: Interval) -> bool | None:
        """Returns True if a paired difference of a metric is a gain, False if it is a loss.

        Returns None if neither higher nor lower values of the metric are better.

        Args:
            metric: name of the metric.
            difference: output of `difference` for this metric.
        """
        direction = self.value(metric).direction
        return None if direction is None else (difference.mean > 0) == (direction == "higher")

    def _shared(self, model: str, base: str) -> list[str]:
        """Returns the names of the metrics and submetrics that both models have."""
        return [m for rows in (self.values, self.sets) for m in rows.get(model, {}) if m in rows.get(base, {})]

    @cached_property
    def _intervals(self) -> dict[tuple[Any, ...], Interval]:
        """The intervals computed so far, since text, Markdown, JSON and report need the same ones."""
        return {}

    def _bootstrap(self, key: tuple[str, ...], values: np.ndarray, rows: np.ndarray | None) -> Interval:
        rows = np.ones(len(values), dtype=bool) if rows is None else rows
        key_of_rows = (*key, rows.tobytes())
        if key_of_rows not in self._intervals:
            groups = np.asarray(self.prompts, dtype=object)[rows].tolist()
            blocks = np.asarray(self.training_seeds)[rows].tolist() if self.training_seeds else None
            self._intervals[key_of_rows] = bootstrap(values[rows], groups, blocks=blocks)
        return self._intervals[key_of_rows]

    def _set_interval(self, values: np.ndarray, rows: np.ndarray | None) -> Interval:
        if rows is not None or math.isnan(values[0]):  # only means can be split
            return EMPTY
        return interval(float(values[0]), values[1:], len(self.prompts), self.num_prompts)

    def by_group(
        self, metric: str, labels: Sequence[str | Sequence[str]] | None = None, paired: bool = False
    ) -> dict[str, dict[str, Interval]]:
        """Returns the intervals of a metric for groups of images: name of a group -> name of a model -> interval.

        Args:
            metric: name of the metric.
            labels: name of the group of each of the ``n`` images, or a sequence of such names for an image in several
                groups. None groups images by the length of their prompt in words.
            paired: returns the paired differences of `pairs` instead, with the keys ``"model - other"``.
        """
        labels = length_labels(self.prompts) if labels is None else labels
        groups = [(label,) if isinstance(label, str) else label for label in labels]
        order = sorted({name for row in groups for name in row}, key=natural_key)
        masks = {name: np.asarray([name in row for row in groups]) for name in order}
        return {name: self._columns(metric, paired, mask) for name, mask in masks.items()}

    def _blocks(self) -> list[tuple[str, Grid]]:
        """Returns the main table, the paired differences and the breakdowns, each as ``(title, rows of cells)``."""
        head = ["", *(self.label(m) for m in self.metrics)]
        main = [head, *([m, *(show(self.interval(m, k), self.value(k)) for k in self.metrics)] for m in self.models)]
        return [("", main), *self._difference_blocks(head), *self._breakdown_blocks()]

    def _difference_blocks(self, head: list[str]) -> list[tuple[str, Grid]]:
        """Returns the table of paired differences, and that of significant losses if any; empty with a single model.

        ``head`` is the first row of the table of paired differences.
        """
        if len(self.models) < 2:
            return []
        rows = [
            [f"{m} - {other}", *(show_difference(self.difference(m, k, other), self.value(k)) for k in self.metrics)]
            for m, other in self.pairs
        ]
        too_few = self.num_prompts < MIN_PROMPTS
        note = f"none marked *: fewer than {MIN_PROMPTS} prompts" if too_few else "* interval excludes zero"
        blocks = [(f"paired differences ({note})", [head, *rows])]
        losses = [
            [f"{m} - {other}", self.label(k), show_difference(change, self.value(k))]
            for m, other in self.pairs
            for k, change in self.significant(m, other)[1].items()
        ]
        if losses:
            blocks.append(("significant losses", [["", "metric", "difference"], *losses]))
        return blocks

    def _breakdown_blocks(self) -> list[tuple[str, Grid]]:
        """Returns the tables of the breakdowns of `main_breakdowns`: values of the models, then paired differences."""
        blocks: list[tuple[str, Grid]] = []
        for metric in self.main_breakdowns:
            for title, groups in self.breakdowns(metric).items():
                rows = [
                    [name, *(show(row[m], self.value(metric)) for m in self.models)] for name, row in groups.items()
                ]
                blocks.append((title, [["", *self.models], *rows]))
            for title, groups in self.breakdowns(metric, paired=True).items():
                pairs = next(iter(groups.values()))
                rows = [
                    [pair, *(show_difference(row[pair], self.value(metric)) for row in groups.values())]
                    for pair in pairs
                ]
                blocks.append((f"paired differences, {title}", [["", *groups], *rows]))
        return blocks

    @property
    def main_breakdowns(self) -> list[str]:
        """Names of the metrics whose breakdowns are shown: those with submetrics.

        If no metric has submetrics, this is the first metric for which higher or lower is better, or if there is none,
        the first metric.
        """
        scores = [m for m in self.metrics if self.value(m).direction]
        return [m for m in self.metrics if self.submetrics(m)] or (scores or self.metrics)[:1]

    def breakdowns(self, metric: str, paired: bool = False) -> dict[str, dict[str, dict[str, Interval]]]:
        """Returns all breakdowns of a metric: title -> name of a group of images -> name of a model -> interval.

        The groups are those of the prompt's length, the training seed, each kind of `labels`, and the submetrics.
        Submetrics are named ``metric/name`` or ``metric/kind/name``; each kind is one breakdown. The result is empty
        for metrics in ``sets``.

        Args:
            metric: name of the metric.
            paired: returns the paired differences of `pairs` instead, with the keys ``"model - other"``; empty with a
                single model.
        """
        breakdowns: dict[str, dict[str, dict[str, Interval]]] = {}
        if (paired and len(self.models) < 2) or any(metric in rows for rows in self.sets.values()):
            return breakdowns
        lengths = self.by_group(metric, paired=paired)
        if len(lengths) > 1:
            breakdowns[f"{self.label(metric)} by length of the prompt in words"] = lengths
        if self.training_seeds:
            seeds = self.by_group(metric, [str(seed) for seed in self.training_seeds], paired)
            breakdowns[f"{self.label(metric)} by training seed"] = seeds
        for name, labels in self.labels.items():
            groups = self.by_group(metric, labels, paired)
            if len(groups) > 1:
                breakdowns[f"{self.label(metric)} by {name} of the prompt"] = groups
        for submetric in self.submetrics(metric):
            *group, name = submetric.split("/")[1:]
            title = f"{self.label(metric)} by {LABELS.get(group[0], group[0]) if group else 'part'}"
            breakdowns.setdefault(title, {})[name] = self._columns(submetric, paired)
        return breakdowns

    def _columns(self, metric: str, paired: bool, rows: np.ndarray | None = None) -> dict[str, Interval]:
        """Returns model -> interval, or if ``paired``, ``"model - other"`` -> interval of the paired difference."""
        if paired:
            return {f"{m} - {other}": self.difference(m, metric, other, rows) for m, other in self.pairs}
        return {m: self.interval(m, metric, rows) for m in self.models}

    def text(self, width: int | None = None) -> str:
        """Returns all tables as text for a terminal of ``width`` characters per line.

        Wider tables are split into several with fewer columns; None does not split.
        """
        return terminal_text(self._blocks(), self._caption(), width)

    def markdown(self) -> str:
        """Returns all tables as Markdown text."""
        return markdown_text(self._blocks(), self._caption())

    def _caption(self) -> str:
        images = f", {len(self.prompts)} images per model" if len(self.prompts) != self.num_prompts else ""
        seeds = f", {len(set(self.training_seeds))} training seeds" if self.training_seeds else ""
        note = f"\n\n{self.note}" if self.note else ""
        return f"{count(self.num_prompts, 'prompt')}{seeds}{images}; mean [95% bootstrap interval]{note}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes of the table as plain values for JSON; NaN becomes None.

        The means, the paired differences and the names of the metrics with significant differences are added.
        """
        metrics = {m: self._shared(m, m) for m in self.models}
        return {
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "means": {m: {k: _plain(self.interval(m, k)) for k in ks} for m, ks in metrics.items()},
            "differences": {
                f"{m} - {other}": {k: _plain(self.difference(m, k, other)) for k in self._shared(m, other)}
                for m, other in self.pairs
            },
            "significant": {
                f"{m} - {other}": dict(zip(("gains", "losses"), map(list, self.significant(m, other)), strict=True))
                for m, other in self.pairs
            },
            "values": {m: {k: _list(row) for k, row in rows.items()} for m, rows in self.values.items()},
            "units": {k: vars(self.value(k)) for k in dict.fromkeys(k for ks in metrics.values() for k in ks)},
            "sets": {m: {k: _list(row) for k, row in rows.items()} for m, rows in self.sets.items()},
            "training_seeds": list(self.training_seeds),
            "neighbours": self.neighbours,
            "note": self.note,
            "labels": {name: [list(row) for row in rows] for name, rows in self.labels.items()},
        }

    def json(self) -> str:
        """Returns the output of `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricTable:
        """Builds a table from the output of `to_dict`, of which only the attributes are read."""
        values, sets = (
            {
                m: {k: np.array([math.nan if x is None else x for x in v], np.float64) for k, v in ks.items()}
                for m, ks in rows.items()
            }
            for rows in (data["values"], data.get("sets", {}))
        )
        units = {k: Value(**v) for k, v in data.get("units", {}).items()}
        more = {key: data[key] for key in ("training_seeds", "neighbours", "note", "labels") if key in data}
        return cls(values, list(data["prompts"]), list(data["seeds"]), units, sets, **more)

    def csv(self) -> str:
        """Returns the values of single images as CSV text: one line per model and image, one column per metric.

        A cell is empty if the image has no value. Several labels of a prompt are separated by semicolons.
        """
        names = dict.fromkeys(k for rows in self.values.values() for k in rows)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        trained = ["training_seed"] if self.training_seeds else []
        writer.writerow(["model", *trained, "prompt", "seed", *self.labels, *names])
        for model, rows in self.values.items():
            for i, prompt in enumerate(self.prompts):
                cells = [_list(rows[k][i : i + 1])[0] if k in rows else None for k in names]
                training_seed = [self.training_seeds[i]] if self.training_seeds else []
                seed = self.seeds[i] if self.seeds else ""
                labels = ["; ".join(rows[i]) for rows in self.labels.values()]
                writer.writerow([model, *training_seed, prompt, seed, *labels, *cells])
        return out.getvalue()


def _list(row: np.ndarray) -> list[float | None]:
    return [None if math.isnan(x) else float(x) for x in row]


def _plain(interval: Interval) -> dict[str, Any]:
    return {k: None if math.isnan(v) else v for k, v in vars(interval).items()}
