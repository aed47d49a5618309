"""Writes an HTML report of a run: metrics, image grids with verdicts, training curves, configs, machine.

The page is the template ``report.html`` with ``report.css``; this module computes what it shows.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel
from torch import Tensor

from longalign.evaluation import charts
from longalign.evaluation.bootstrap import MIN_PROMPTS, Interval
from longalign.evaluation.comparison import findings
from longalign.evaluation.formatting import number
from longalign.evaluation.record import machine, non_defaults, read_log
from longalign.evaluation.table import MetricTable
from longalign.image_io import to_pil
from longalign.metrics.base import Value

LONGEST_SIDE = 384
"""Pixels; larger images are downscaled to this before embedding."""


@dataclass(frozen=True)
class Example:
    """One prompt with the image of every model, from the same seed.

    Attributes:
        sentences: the sentences of the prompt.
        seed: seed of the noise.
        images: model -> image ``(3, h, w)`` in [0, 1].
        verdicts: model -> sentence -> fact -> whether the fact holds in the image.
        scores: model -> sentence -> a reward's score.
        truncated: model -> indices of the sentences that its encoder truncated, partly or completely.
    """

    sentences: Sequence[str]
    seed: int
    images: Mapping[str, Tensor]
    verdicts: Mapping[str, Sequence[Sequence[bool]]] = field(default_factory=dict)
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    truncated: Mapping[str, frozenset[int]] = field(default_factory=dict)


def write_report(
    path: Path | str,
    *,
    title: str,
    lead: str,
    table: MetricTable,
    examples: Sequence[Example] = (),
    logs: Mapping[str, Path | str] | None = None,
    configs: Mapping[str, BaseModel] | None = None,
    seconds: Mapping[str, float] | None = None,
    score_name: str = "score",
) -> Path:
    """Writes the report: one HTML file without scripts, viewable offline.

    Args:
        path: path of the HTML file; missing folders are created.
        title: heading.
        lead: plain text below the heading.
        table: metrics of the models; the first model is the base.
        examples: image grids.
        logs: stage -> its ``log.jsonl``, one JSON object per line with ``step`` and numbers.
        configs: stage -> its config.
        seconds: stage -> duration in seconds.
        score_name: name of the examples' scores.

    Returns:
        The path of the HTML file.
    """
    loader = PackageLoader("longalign.evaluation", ".")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=title,
        lead=lead,
        models=table.models,
        min_prompts=MIN_PROMPTS,
        **_metrics(table),
        **_breakdowns(table),
        examples=[_example(example, [m for m in table.models if m in example.images]) for example in examples],
        score_name=score_name,
        stages=[_stage(name, Path(log)) for name, log in (logs or {}).items()],
        configs=[
            (stage, _yaml(non_defaults(config)), _yaml(config.model_dump(mode="json")))
            for stage, config in (configs or {}).items()
        ],
        times={stage: f"{value:.0f} s" for stage, value in (seconds or {}).items()},
        versions=machine(),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


class Cell(NamedTuple):
    """A mean and its interval as texts; ``bold`` for a significant difference."""

    mean: str
    low: str
    high: str
    bold: bool


class Grid(NamedTuple):
    """Rows of cells with names; a cell without values is None."""

    head: list[str]
    rows: list[tuple[str, list[Cell | None]]]


class Chip(NamedTuple):
    """Result of one model's image for one sentence: a count of facts in ``lines``, smaller texts in ``notes``."""

    kind: str
    lines: list[str]
    notes: list[str]


def _cell(interval: Interval, value: Value, difference: bool = False) -> Cell | None:
    if not interval.count:
        return None
    mean, low, high = (number(v, value, difference) for v in (interval.mean, interval.low, interval.high))
    return Cell(mean, low, high, difference and interval.significant)


def _metrics(table: MetricTable) -> dict[str, Any]:
    """Returns the findings, the main table and the paired differences.

    Findings and differences are only included for several models.
    """
    prompts, images = table.num_prompts, len(table.prompts)
    head = [table.label(m) for m in table.metrics]
    rows = [(model, [_cell(table.interval(model, m), table.value(m)) for m in table.metrics]) for model in table.models]
    differences = [
        (f"{model} - {other}", [_cell(table.difference(model, m, other), table.value(m), True) for m in table.metrics])
        for model, other in table.pairs
    ]
    several = len(table.models) > 1
    return {
        "findings": [_head_and_rest(text) for text in findings(table)] if several else [],
        "counts": f"{prompts} prompts, {'one image each' if images == prompts else f'{images} images'}",
        "metrics": Grid(head, rows),
        "differences": Grid(head, differences) if several else None,
    }


def _head_and_rest(text: str) -> tuple[str, str]:
    head, colon, rest = text.partition(": ")
    return head, colon + rest


def _breakdowns(table: MetricTable) -> dict[str, Any]:
    """Returns the charts of the breakdowns, and their paired differences as ``(title, grid)``."""
    figures: list[Markup] = []
    differences: list[tuple[str, Grid]] = []
    for metric in table.main_breakdowns:
        value = table.value(metric)
        for title, rows in table.breakdowns(metric).items():
            figures.append(Markup(charts.intervals(title, rows, lambda v, value=value: number(v, value))))
        for title, groups in table.breakdowns(metric, paired=True).items():
            pairs = next(iter(groups.values()))
            rows = [(pair, [_cell(row[pair], value, True) for row in groups.values()]) for pair in pairs]
            differences.append((title, Grid(list(groups), rows)))
    return {"breakdown_charts": figures, "breakdown_differences": differences}


def _example(example: Example, models: Sequence[str]) -> dict[str, Any]:
    images = []
    for model in models:
        facts = [fact for sentence in example.verdicts.get(model, ()) for fact in sentence]
        count = f"{sum(facts)} of {len(facts)} facts" if facts else ""
        images.append({"model": model, "url": data_url(example.images[model]), "facts": count})
    return {
        "seed": example.seed,
        "images": images,
        "rows": [(text, [_chip(example, model, i) for model in models]) for i, text in enumerate(example.sentences)],
        "verdicts": example.verdicts,
        "scores": example.scores,
        "any_truncated": any(example.truncated.values()),
    }


def _chip(example: Example, model: str, sentence: int) -> Chip:
    kind, lines, notes = [], [], []
    if model in example.verdicts:
        facts = example.verdicts[model][sentence]
        kind += ["true" if all(facts) else "part" if any(facts) else "false"] if facts else []
        lines.append(f"{sum(facts)}/{len(facts)}" if facts else "-")
    if model in example.scores:
        notes.append(f"{example.scores[model][sentence]:.3f}")
    if sentence in example.truncated.get(model, ()):
        kind.append("truncated")
        notes.append("truncated")
    return Chip(" ".join(kind), lines, notes)


def data_url(image: Tensor) -> str:
    """Returns an image ``(3, h, w)`` in [0, 1] as a PNG ``data:`` URL, at most `LONGEST_SIDE` pixels wide and high."""
    pil_image = to_pil(image)
    pil_image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    pil_image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _stage(name: str, log: Path) -> dict[str, Any]:
    """Returns the charts of a log's curves, and the curves that are constant; ``missing`` if there is no log."""
    if not log.exists():
        return {"name": name, "missing": str(log)}
    curves = {key.replace("_", "-"): curve for key, curve in read_log(log).items()}
    return {
        "name": name,
        "missing": "",
        "charts": [Markup(charts.curve(key, *curve)) for key, curve in curves.items() if len(set(curve[1])) > 1],
        "constant": [f"{key} {values[0]:g}" for key, (_, values) in curves.items() if len(set(values)) == 1],
    }


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
