"""Writes the report: one HTML page with metrics, images, sentences, training curves, configs and machine.

The page is the template ``report.html`` with ``report.css`` and ``report.js``; this module computes what it shows.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel

from longalign.errors import redact_url
from longalign.evaluation.bootstrap import EMPTY, MIN_PROMPTS, Interval
from longalign.evaluation.comparison import findings
from longalign.evaluation.formatting import number
from longalign.evaluation.record import machine, non_defaults
from longalign.evaluation.report_charts import breakdown_charts, training
from longalign.evaluation.report_examples import Example, examples_context
from longalign.evaluation.table import MetricTable
from longalign.metrics.base import Value
from longalign.names import count

BUDGET = 8_000_000
"""Maximum number of bytes of all images of a page, before base64, which adds a third."""


@dataclass(frozen=True)
class AblationCell:
    """What the report shows of one cell of an ablation, i.e. of one variant of its base config.

    Attributes:
        name: name of the cell in the table.
        overrides: the config values that the cell changes, e.g. ``loop.lr=0.0001``.
        seeds: training seeds of the runs of the cell.
    """

    name: str
    overrides: Sequence[str]
    seeds: Sequence[int] = ()


def write_report(
    path: Path | str,
    *,
    title: str,
    lead: str = "",
    table: MetricTable | None = None,
    examples: Sequence[Example] = (),
    logs: Mapping[str, Path | str] | None = None,
    configs: Mapping[str, BaseModel] | None = None,
    seconds: Mapping[str, float] | None = None,
    score_name: str = "score",
    cells: Sequence[AblationCell] = (),
    budget: int = BUDGET,
) -> Path:
    """Writes the report: one HTML file that needs no network.

    Args:
        path: path of the HTML file; missing folders are created.
        title: heading.
        lead: plain text below the heading that describes what was done.
        table: metrics of the models; the others are compared with the first model. None shows no metrics.
        examples: prompts with images. If their images exceed the budget, examples at the end are omitted.
        logs: name of a training run -> path of its ``log.jsonl``, one JSON object per line with ``step`` and numbers.
        configs: name of a training run -> its config.
        seconds: name of a step of the work, e.g. "measuring" -> its duration in seconds.
        score_name: display name of ``scores`` in the examples.
        cells: the cells of an ablation; empty for other reports.
        budget: maximum number of bytes of all images together, before base64. Images are downscaled and compressed to
            fit.

    Returns:
        The path of the HTML file.
    """
    loader = PackageLoader("longalign.evaluation", ".")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    models = table.models if table else list(dict.fromkeys(m for e in examples for m in e.images))
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("report.html").render(
        title=title,
        lead=lead,
        models=models,
        min_prompts=MIN_PROMPTS,
        **_metrics(table),
        breakdowns=breakdown_charts(table) if table else [],
        breakdown_differences=_breakdown_differences(table) if table else [],
        **examples_context(table, models, examples, budget),
        score_name=score_name,
        stages=training({name: Path(log) for name, log in (logs or {}).items()}),
        configs=[
            (stage, _yaml(non_defaults(config)), _yaml(config.model_dump(mode="json")))
            for stage, config in (configs or {}).items()
        ],
        cells=cells,
        times={stage: f"{value:.0f} s" for stage, value in (seconds or {}).items()},
        versions=machine(),
        script=Markup(script),
        script_hash=digest,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


class Cell(NamedTuple):
    """A cell of a table on the page: a mean and the ends of its interval, formatted as text.

    ``kind`` is "gain" or "loss" for a significant difference, or "change" if neither higher nor lower values of the
    metric are better. It is empty for all other values.
    """

    mean: str
    low: str
    high: str
    kind: str


class ReportTable(NamedTuple):
    """A table on the page: the names of the columns, and (name, cells) of each row. A cell without values is None."""

    head: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def _cell(interval: Interval, value: Value, is_gain: bool | None = None, difference: bool = False) -> Cell | None:
    if not interval.count:
        return None
    mean, low, high = (number(v, value, difference) for v in (interval.mean, interval.low, interval.high))
    significant = difference and interval.significant
    return Cell(mean, low, high, {True: "gain", False: "loss", None: "change"}[is_gain] if significant else "")


def _difference(table: MetricTable, metric: str, interval: Interval) -> Cell | None:
    return _cell(interval, table.value(metric), table.is_gain(metric, interval), difference=True)


def _metrics(table: MetricTable | None) -> dict[str, Any]:
    """Returns the template's values of the metrics: findings, summary of each model, main table, paired differences.

    Findings and differences need several models.
    """
    if table is None or not table.metrics:
        return {"findings": [], "hero": [], "losses": [], "counts": "", "metrics": None, "differences": None}
    prompts, images = count(table.num_prompts, "prompt"), len(table.prompts)
    per_model = "one image each" if images == table.num_prompts else f"{images} images per model"
    several = len(table.models) > 1
    rows = [
        (table.label(k), [_cell(_interval(table, m, k), table.value(k)) for m in table.models]) for k in table.metrics
    ]
    differences = [
        (table.label(k), [_difference(table, k, table.difference(m, k, other)) for m, other in table.pairs])
        for k in table.metrics
        if all(_has(table, m, k) for m in table.models)
    ]
    return {
        "findings": [_head_and_rest(text) for text in findings(table)] if several else [],
        "hero": _hero(table),
        "losses": _losses(table),
        "counts": f"{prompts}, {per_model}",
        "metrics": ReportTable(table.models, rows),
        "differences": ReportTable([f"{m} - {o}" for m, o in table.pairs], differences) if several else None,
    }


def _has(table: MetricTable, model: str, metric: str) -> bool:
    return metric in table.values.get(model, {}) or metric in table.sets.get(model, {})


def _interval(table: MetricTable, model: str, metric: str) -> Interval:
    return table.interval(model, metric) if _has(table, model, metric) else EMPTY


def _hero(table: MetricTable) -> list[dict[str, Any]]:
    """Returns for each model the mean of the first metric, and the paired difference of `MetricTable.steps`."""
    metric, out = table.metrics[0], []
    for model, other in [(table.base, None), *table.steps]:
        change = None if other is None else _difference(table, metric, table.difference(model, metric, other))
        out.append(
            {
                "model": model,
                "label": table.label(metric),
                "cell": _cell(table.interval(model, metric), table.value(metric)),
                "change": change,
                "other": other,
            }
        )
    return out


def _losses(table: MetricTable) -> list[tuple[str, str, Cell | None]]:
    """Returns the significant losses of the pairs of `MetricTable.steps`, as (pair, metric, difference)."""
    return [
        (f"{model} - {other}", table.label(k), _difference(table, k, change))
        for model, other in table.steps
        for k, change in table.significant(model, other)[1].items()
    ]


def _head_and_rest(text: str) -> tuple[str, str]:
    head, colon, rest = text.partition(": ")
    return head, colon + rest


def _breakdown_differences(table: MetricTable) -> list[tuple[str, ReportTable]]:
    """Returns the paired differences in each breakdown of a metric by groups of prompts, as ``(title, table)``."""
    grids = []
    for metric in table.main_breakdowns:
        for title, groups in table.breakdowns(metric, paired=True).items():
            pairs = list(next(iter(groups.values())))
            rows = [(name, [_difference(table, metric, row[p]) for p in pairs]) for name, row in groups.items()]
            grids.append((title, ReportTable(pairs, rows)))
    return grids


def _yaml(value: Any) -> str:
    return redact_url(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))
