"""Metric tables: means with intervals and paired differences of several models on the same prompts and seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from longalign.evaluation.bootstrap import MIN_PROMPTS, Interval, bootstrap
from longalign.evaluation.formatting import (
    GROUP_LABELS,
    Grid,
    label,
    markdown_text,
    show,
    show_difference,
    terminal_text,
)
from longalign.evaluation.groups import length_labels, natural_key


@dataclass(frozen=True)
class MetricTable:
    """Metric values of several models on the same prompts and seeds. The first model is the base.

    A metric with ``/`` in its name (``facts/colour``) is a submetric of the metric before the slash. Submetrics are
    shown in breakdowns, not in the main table.

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
    def num_prompts(self) -> int:
        """Number of different prompts."""
        return len(set(self.prompts))

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
        """Returns the names of a metric's submetrics, e.g. ``facts/colour``."""
        names = dict.fromkeys(m for v in self.values.values() for m in v)
        return [m for m in names if m.startswith(metric + "/")]

    def row(self, model: str, metric: str) -> np.ndarray:
        """Returns the ``(n,)`` values of one model."""
        if model not in self.values or metric not in self.values[model]:
            raise ValueError(
                f"no '{metric}' of '{model}'; available: metrics {', '.join(self.metrics)}, "
                f"models {', '.join(self.models)}"
            )
        return np.asarray(self.values[model][metric], dtype=np.float64)

    def interval(self, model: str, metric: str, rows: np.ndarray | None = None) -> Interval:
        """Returns the mean and 95% interval over all images, or over those selected by the boolean mask ``rows``."""
        return self._bootstrap((model, metric), self.row(model, metric), rows)

    def difference(self, model: str, metric: str, base: str | None = None, rows: np.ndarray | None = None) -> Interval:
        """Returns the mean paired difference to the model ``base`` (the first one if None), with its 95% interval."""
        base = base or self.base
        return self._bootstrap((model, metric, base), self.row(model, metric) - self.row(base, metric), rows)

    def significant(self, model: str, base: str | None = None) -> tuple[dict[str, Interval], dict[str, Interval]]:
        """Returns the significant paired differences between two models, including submetrics.

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

    @cached_property
    def _intervals(self) -> dict[tuple[Any, ...], Interval]:
        """The intervals so far: text, Markdown, JSON and report show the same ones."""
        return {}

    def _bootstrap(self, key: tuple[str, ...], values: np.ndarray, rows: np.ndarray | None) -> Interval:
        rows = np.ones(len(values), dtype=bool) if rows is None else rows
        key_of_rows = (*key, rows.tobytes())
        if key_of_rows not in self._intervals:
            groups = np.asarray(self.prompts, dtype=object)[rows].tolist()
            self._intervals[key_of_rows] = bootstrap(values[rows], groups)
        return self._intervals[key_of_rows]

    def by_group(
        self, metric: str, labels: Sequence[str] | None = None, paired: bool = False
    ) -> dict[str, dict[str, Interval]]:
        """Returns the intervals of a metric by groups of images: label -> model -> interval.

        Args:
            metric: name of the metric.
            labels: one group label per image; the prompt's length in words if None.
            paired: return the differences of `pairs` instead of the models' values.
        """
        labels = length_labels(self.prompts) if labels is None else labels
        order = sorted(set(labels), key=natural_key)
        masks = {name: np.asarray([label == name for label in labels]) for name in order}
        return {name: self._columns(metric, paired, mask) for name, mask in masks.items()}

    def _blocks(self) -> list[tuple[str, Grid]]:
        """Returns the main table, the differences and the breakdowns, as titled grids of cells."""
        head = ["", *(label(m) for m in self.metrics)]
        main = [head, *([m, *(show(self.interval(m, k), k) for k in self.metrics)] for m in self.models)]
        return [("", main), *self._difference_blocks(head), *self._breakdown_blocks()]

    def _difference_blocks(self, head: list[str]) -> list[tuple[str, Grid]]:
        """Returns the paired differences, and the significant losses if any; empty with a single model."""
        if len(self.models) < 2:
            return []
        rows = [
            [f"{m} - {other}", *(show_difference(self.difference(m, k, other), k) for k in self.metrics)]
            for m, other in self.pairs
        ]
        too_few = self.num_prompts < MIN_PROMPTS
        note = f"none marked *: fewer than {MIN_PROMPTS} prompts" if too_few else "* interval excludes zero"
        blocks = [(f"paired differences ({note})", [head, *rows])]
        losses = [
            [f"{m} - {other}", label(k), show_difference(change, k)]
            for m, other in self.pairs
            for k, change in self.significant(m, other)[1].items()
        ]
        if losses:
            blocks.append(("significant losses", [["", "metric", "difference"], *losses]))
        return blocks

    def _breakdown_blocks(self) -> list[tuple[str, Grid]]:
        """Returns the breakdowns of `main_breakdowns`: values of the models, then paired differences."""
        blocks: list[tuple[str, Grid]] = []
        for metric in self.main_breakdowns:
            for title, groups in self.breakdowns(metric).items():
                rows = [[name, *(show(row[m], metric) for m in self.models)] for name, row in groups.items()]
                blocks.append((title, [["", *self.models], *rows]))
            for title, groups in self.breakdowns(metric, paired=True).items():
                pairs = next(iter(groups.values()))
                rows = [[pair, *(show_difference(row[pair], metric) for row in groups.values())] for pair in pairs]
                blocks.append((f"paired differences, {title}", [["", *groups], *rows]))
        return blocks

    @property
    def main_breakdowns(self) -> list[str]:
        """The metrics whose breakdowns are shown: those with submetrics, or the first metric if there are none."""
        return [m for m in self.metrics if self.submetrics(m)] or self.metrics[:1]

    def breakdowns(self, metric: str, paired: bool = False) -> dict[str, dict[str, dict[str, Interval]]]:
        """Returns all breakdowns of a metric, by prompt length and by submetrics: title -> label -> model -> interval.

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
        """Returns model -> interval, or ``"model - other"`` -> interval of the paired difference."""
        if paired:
            return {f"{m} - {other}": self.difference(m, metric, other, rows) for m, other in self.pairs}
        return {m: self.interval(m, metric, rows) for m in self.models}

    def text(self, width: int | None = None) -> str:
        """Formats the table for a terminal of ``width`` columns. Wider grids are split; None does not split."""
        return terminal_text(self._blocks(), self._caption(), width)

    def markdown(self) -> str:
        """Formats the table as Markdown."""
        return markdown_text(self._blocks(), self._caption())

    def _caption(self) -> str:
        images = f", {len(self.prompts)} images per model" if len(self.prompts) != self.num_prompts else ""
        return f"{self.num_prompts} prompts{images}; mean [95% bootstrap interval]"

    def to_dict(self) -> dict[str, Any]:
        """Returns the table with the values of each image, as plain values for JSON; NaN becomes None."""
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
        """Returns `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricTable:
        """Builds the table from the output of `to_dict`."""
        values = {m: {k: np.array([math.nan if x is None else x for x in v]) for k, v in ks.items()}
                  for m, ks in data["values"].items()}  # fmt: skip
        return cls(values, list(data["prompts"]), list(data["seeds"]))


def _plain(interval: Interval) -> dict[str, Any]:
    return {k: None if math.isnan(v) else v for k, v in vars(interval).items()}
