"""Chooses the charts of the report: breakdowns of metrics, and curves of training runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from longalign.evaluation import charts
from longalign.evaluation.formatting import number
from longalign.evaluation.record import read_log
from longalign.evaluation.table import MetricTable

HELD_OUT = "monitor/"
"""Start of the names of curves that are measured on held-out prompts during training."""
FIRST = ("reward", HELD_OUT, "text_relevant", "text_irrelevant", "loss")
"""Starts of the names of the curves that are shown first; others are folded away."""

Curve = tuple[list[float], list[float]]


def breakdown_charts(table: MetricTable) -> list[tuple[str, list[Markup]]]:
    """Returns the charts of each metric with breakdowns, as ``(metric, charts)``; those of a metric share an axis."""
    out = []
    for metric in table.main_breakdowns:
        value, groups = table.value(metric), table.breakdowns(metric)
        found = [v for rows in groups.values() for row in rows.values() for v in row.values() if v.count]
        if not found:
            continue
        limits = (min(v.low for v in found), max(v.high for v in found))
        if value.unit == "%" and limits[0] >= 0 and limits[1] <= 1 and limits[1] - limits[0] > 0.4:
            limits = (0.0, 1.0)
        figures = [
            Markup(charts.intervals(f"by {title.partition(' by ')[2]}", rows, lambda v, u=value: number(v, u), limits))
            for title, rows in groups.items()
        ]
        out.append((table.label(metric), figures))
    return out


class Stage(NamedTuple):
    """The curves of runs that log the same values.

    Attributes:
        name: names of the runs.
        missing: a log that does not exist.
        charts: the most important curves.
        others: other curves.
        constant: values that do not change.
    """

    name: str
    missing: str = ""
    charts: tuple[Markup, ...] = ()
    others: tuple[Markup, ...] = ()
    constant: tuple[str, ...] = ()


def training(logs: Mapping[str, Path]) -> list[Stage]:
    """Returns the charts of runs. Runs that log the same values, e.g. those of an ablation, share charts."""
    out: list[Stage] = []
    groups: dict[frozenset[str], dict[str, dict[str, Curve]]] = {}
    for name, log in logs.items():
        if not log.exists():
            out.append(Stage(name, missing=str(log)))
            continue
        curves = read_log(log)
        groups.setdefault(frozenset(curves), {})[name] = curves
    return [_stage(runs) for runs in groups.values()] + out


def _stage(runs: Mapping[str, Mapping[str, Curve]]) -> Stage:
    first, others, constant = [], [], []
    names = list(dict.fromkeys(key for curves in runs.values() for key in curves))
    drawn: dict[str, tuple[list[str], dict[str, Curve]]] = {}  # by the numbers: equal curves are drawn once
    for key in sorted(names, key=_order):
        inner = key.removeprefix(HELD_OUT)
        if key != inner and inner in names:
            continue  # drawn with the training curve
        lines: dict[str, Curve] = {}
        for run, curves in runs.items():
            several = f"{run}, " if len(runs) > 1 else ""
            held_out = curves.get(HELD_OUT + key)
            lines[f"{several}training" if held_out else run] = curves[key]
            lines |= {f"{several}held-out": held_out} if held_out else {}
        if all(len(set(values)) == 1 for _, values in lines.values()):
            constant.append(f"{_title(key)} {next(iter(lines.values()))[1][0]:g}")
        else:
            drawn.setdefault(repr(lines), ([], lines))[0].append(key)
    for keys, lines in drawn.values():
        figure = Markup(charts.curves(" = ".join(map(_title, keys)), lines))
        (first if _order(keys[0])[0] < len(FIRST) else others).append(figure)
    if not first:
        first, others = others, []
    return Stage(", ".join(runs), "", tuple(first), tuple(others), tuple(constant))


def _order(key: str) -> tuple[int, str]:
    return next((i for i, start in enumerate(FIRST) if key.startswith(start)), len(FIRST)), key


def _title(key: str) -> str:
    held_out = key.startswith(HELD_OUT)
    return key.removeprefix(HELD_OUT).replace("_", "-") + (", held-out" if held_out else "")
