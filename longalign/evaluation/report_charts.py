"""Draws the charts of the report: metrics by groups of images (breakdowns), and curves of training runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from longalign.evaluation import charts
from longalign.evaluation.formatting import label, number
from longalign.evaluation.record import read_log
from longalign.evaluation.table import MetricTable
from longalign.files.paths import best_checkpoint, step_of
from longalign.metrics.base import Value

HELD_OUT = "monitor/"
"""Start of the names of curves that are measured on held-out prompts during training."""
COSTS = (f"{HELD_OUT}seconds", f"{HELD_OUT}share_of_time")
"""Names of the curves of the time that held-out measurements took: in seconds, and as a fraction of the run's time."""
OF_TRAINING = f"{HELD_OUT}training/"
"""Prefix of the names of curves that show training values, averaged from one held-out measurement to the next."""
FIRST = ("reward", HELD_OUT, "text_relevant", "text_irrelevant", "loss")
"""Starts of the names of the curves that are shown first; others are in a closed section of the page."""

Curve = tuple[list[float], list[float]]
"""Steps and values."""


def breakdown_charts(table: MetricTable) -> list[tuple[str, list[Markup]]]:
    """Returns (display name, charts as HTML) of each metric of `MetricTable.main_breakdowns` that has values.

    Each breakdown of a metric is one chart. All charts of one metric have the same x axis.
    """
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
    """The training curves of one run, or of several runs that log the same values, with charts as HTML.

    Attributes:
        name: names of the runs, separated by commas.
        missing: empty if the log exists; if it does not, its path, and all later attributes are empty.
        charts: charts of the most important values, see `FIRST`.
        breakdowns: charts of held-out metrics by groups of images.
        others: charts of the other values.
        constant: "name number" of each value that does not change.
        notes: sentences about the held-out measurements and the best checkpoint, without the final period.
    """

    name: str
    missing: str = ""
    charts: tuple[Markup, ...] = ()
    breakdowns: tuple[Markup, ...] = ()
    others: tuple[Markup, ...] = ()
    constant: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def training(logs: Mapping[str, Path]) -> list[Stage]:
    """Returns the curves of training runs. Runs that log the same values, e.g. those of an ablation, share a `Stage`.

    Args:
        logs: name of a run -> path of its ``log.jsonl``. A missing file gives a `Stage` without charts.
    """
    out: list[Stage] = []
    groups: dict[frozenset[str], dict[str, dict[str, Curve]]] = {}
    for name, log in logs.items():
        if not log.exists():
            out.append(Stage(name, missing=str(log)))
            continue
        curves = read_log(log)
        groups.setdefault(frozenset(curves), {})[name] = curves
    best = {name: best_checkpoint(log.parent) for name, log in logs.items()}
    steps = {name: None if checkpoint is None else step_of(checkpoint) for name, checkpoint in best.items()}
    return [_stage(runs, steps) for runs in groups.values()] + out


def _stage(runs: Mapping[str, Mapping[str, Curve]], best: Mapping[str, int | None]) -> Stage:
    found: dict[str, list[Markup]] = {"first": [], "breakdowns": [], "others": []}
    constant: list[str] = []
    mark = best[next(iter(runs))] if len(runs) == 1 else None
    names = list(dict.fromkeys(key for curves in runs.values() for key in curves))
    drawn: dict[str, tuple[list[str], dict[str, Curve]]] = {}  # by the numbers: equal curves are drawn once
    for key, members in _charts(names, single=len(runs) == 1).items():
        lines: dict[str, Curve] = {}
        for run, curves in runs.items():
            several = f"{run}, " if len(runs) > 1 else ""
            if members != [key]:
                lines |= {member.rpartition("/")[2]: curves[member] for member in members}
                continue
            held_out = curves.get(HELD_OUT + key)
            lines[f"{several}training" if held_out else run] = curves[key]
            lines |= {f"{several}held-out": held_out} if held_out else {}
        if all(len(set(values)) == 1 for _, values in lines.values()):
            constant += [f"{_title(member)} {next(iter(runs.values()))[member][1][0]:g}" for member in members]
        else:
            drawn.setdefault(repr(lines), ([], lines))[0].append(key)
    for keys, lines in drawn.values():
        held_out = keys[0].startswith(HELD_OUT)
        figure = Markup(charts.curves(" = ".join(map(_title, keys)), lines, mark=mark if held_out else None))
        found[_section(keys[0])].append(figure)
    if not found["first"]:
        found |= {"first": found["others"], "others": []}
    first, breakdowns, others = (tuple(figures) for figures in found.values())
    return Stage(", ".join(runs), "", first, breakdowns, others, tuple(constant), tuple(_notes(runs, best)))


def _charts(names: Sequence[str], single: bool) -> dict[str, list[str]]:
    """Returns name of a chart -> names of the logged values that the chart shows as curves.

    Training and held-out values of one name are in one chart. With a ``single`` run, all curves of a breakdown are in
    one chart, or in several if there are too many for the colours. `COSTS` have no chart.
    """
    out: dict[str, list[str]] = {}
    for key in sorted(names, key=_order):
        inner = key.removeprefix(HELD_OUT)
        if key in COSTS or (key != inner and inner in names):
            continue
        grouped = single and _section(key) == "breakdowns"
        out.setdefault(key.rpartition("/")[0] if grouped else key, []).append(key)
    halves = {}
    for key, members in out.items():
        count = -(-len(members) // charts.COLORS)  # lines of one chart have different colors
        size = -(-len(members) // count)
        for i in range(count):
            part = f" ({i + 1} of {count})" if count > 1 else ""
            halves[key + part] = members[i * size : (i + 1) * size]
    return halves


def _section(key: str) -> str:
    if key.startswith(HELD_OUT) and "/" in key.removeprefix(HELD_OUT) and not key.startswith(OF_TRAINING):
        return "breakdowns"
    return "first" if _order(key)[0] < len(FIRST) else "others"


def _order(key: str) -> tuple[int, bool]:
    """Returns a sort key of the names of curves by `FIRST`. Equal keys keep the order of the names in the log."""
    rank = next((i for i, start in enumerate(FIRST) if key.startswith(start)), len(FIRST))
    return (len(FIRST), True) if key.startswith(OF_TRAINING) else (rank, key not in FIRST)


def _title(key: str) -> str:
    if key.startswith(OF_TRAINING):
        return f"{label(key.removeprefix(OF_TRAINING), Value())} in training, mean since the previous measurement"
    inner = key.removeprefix(HELD_OUT)
    return label(inner, Value()) + (", held-out" if key != inner else "")


def _notes(runs: Mapping[str, Mapping[str, Curve]], best: Mapping[str, int | None]) -> Iterator[str]:
    """Yields for each run the time that its held-out measurements took, and the step of its best checkpoint."""
    for run, curves in runs.items():
        of_run = f" of {run}" if len(runs) > 1 else ""
        if all(cost in curves for cost in COSTS):
            (steps, seconds), (_, shares) = (curves[cost] for cost in COSTS)
            cost = f"{seconds[-1]:.0f} s, {100 * shares[-1]:.0f}% of the time"
            yield f"Monitor{of_run}: {len(steps)} measurements, {cost}"
        if (step := best[run]) is not None:
            yield f"Best checkpoint{of_run}: step {step}" + (", the dashed line" if len(runs) == 1 else "")
