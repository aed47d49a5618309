"""Writes the report: one HTML page with metrics, images, sentences, training curves, configs and machine.

The page is the template ``report.html`` with ``report.css`` and ``report.js``; this module computes what it shows.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel
from torch import Tensor

from longalign.evaluation.bootstrap import MIN_PROMPTS, Interval
from longalign.evaluation.comparison import findings
from longalign.evaluation.formatting import number
from longalign.evaluation.groups import LENGTH_EDGES, length_labels, natural_key
from longalign.evaluation.pictures import encode_all
from longalign.evaluation.record import machine, non_defaults
from longalign.evaluation.report_charts import breakdown_charts, training
from longalign.evaluation.table import MetricTable
from longalign.metrics.base import Value

BUDGET = 8_000_000
"""Bytes of the images of a page, before their encoding as text, which adds a third."""
SCORE_BINS = 5
"""Colors of scores: equally many sentences of the page have each color."""


@dataclass(frozen=True)
class Example:
    """One prompt with the image of every model, from the same seed.

    Attributes:
        sentences: the sentences of the prompt.
        seed: seed of the noise; None if unknown.
        images: model -> image ``(3, h, w)`` in [0, 1], or its file.
        verdicts: model -> sentence -> fact -> whether the fact holds in the image.
        scores: model -> sentence -> a reward's score.
        truncated: model -> indices of the sentences that its encoder truncated, partly or completely.
        facts: sentence -> names of its facts.
        row: index of the prompt and seed in the table; None if it is not in the table.
    """

    sentences: Sequence[str]
    seed: int | None
    images: Mapping[str, Tensor | Path]
    verdicts: Mapping[str, Sequence[Sequence[bool]]] = field(default_factory=dict)
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    truncated: Mapping[str, frozenset[int]] = field(default_factory=dict)
    facts: Sequence[Sequence[str]] = ()
    row: int | None = None


@dataclass(frozen=True)
class Trial:
    """One cell of an ablation.

    Attributes:
        name: its name in the table.
        overrides: what it changes, e.g. ``trainer.eta=0.5``.
        seeds: seeds of its runs.
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
    trials: Sequence[Trial] = (),
    budget: int = BUDGET,
) -> Path:
    """Writes the report: one HTML file that needs no network.

    Args:
        path: path of the HTML file; missing folders are created.
        title: heading.
        lead: plain text that says what was done.
        table: metrics of the models; the first model is the base.
        examples: prompts with images. Those whose images exceed the budget are left out at the end.
        logs: run -> its ``log.jsonl``, one JSON object per line with ``step`` and numbers.
        configs: run -> its config.
        seconds: stage -> duration in seconds.
        score_name: name of the examples' scores.
        trials: the cells of an ablation.
        budget: bytes of all images together; they are downscaled and compressed to fit.

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
        **_examples(table, models, examples, budget),
        score_name=score_name,
        stages=training({name: Path(log) for name, log in (logs or {}).items()}),
        configs=[
            (stage, _yaml(non_defaults(config)), _yaml(config.model_dump(mode="json")))
            for stage, config in (configs or {}).items()
        ],
        trials=trials,
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
    """A mean and its interval as texts; ``kind`` of a significant difference: ``gain``, ``loss`` or ``change``."""

    mean: str
    low: str
    high: str
    kind: str


class Grid(NamedTuple):
    """Rows of cells with names; a cell without values is None."""

    head: list[str]
    rows: list[tuple[str, list[Cell | None]]]


class Chip(NamedTuple):
    """Result of one model's image for one sentence.

    Attributes:
        kind: CSS classes: ``true``, ``part`` or ``false`` for the facts, ``s0`` to ``s4`` for the score, ``truncated``.
        shown: the facts that hold, e.g. ``1/2``.
        facts: one digit per fact, 1 if it holds.
        score: the score.
    """

    kind: str
    shown: str
    facts: str
    score: str


def _cell(interval: Interval, value: Value, is_gain: bool | None = None, difference: bool = False) -> Cell | None:
    if not interval.count:
        return None
    mean, low, high = (number(v, value, difference) for v in (interval.mean, interval.low, interval.high))
    significant = difference and interval.significant
    return Cell(mean, low, high, {True: "gain", False: "loss", None: "change"}[is_gain] if significant else "")


def _difference(table: MetricTable, metric: str, interval: Interval) -> Cell | None:
    return _cell(interval, table.value(metric), table.is_gain(metric, interval), difference=True)


def _metrics(table: MetricTable | None) -> dict[str, Any]:
    """Returns the findings, the summary of each model, the main table and the paired differences.

    Findings and differences are only included for several models.
    """
    if table is None or not table.metrics:
        return {"findings": [], "hero": [], "losses": [], "counts": "", "metrics": None, "differences": None}
    prompts, images = table.num_prompts, len(table.prompts)
    several = len(table.models) > 1
    rows = [
        (table.label(k), [_cell(_interval(table, m, k), table.value(k)) for m in table.models]) for k in _all(table)
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
        "counts": f"{prompts} prompts, {'one image each' if images == prompts else f'{images} images per model'}",
        "metrics": Grid(table.models, rows),
        "differences": Grid([f"{m} - {o}" for m, o in table.pairs], differences) if several else None,
    }


def _all(table: MetricTable) -> list[str]:
    return [k for k in table.metrics if any(_has(table, m, k) for m in table.models)]


def _has(table: MetricTable, model: str, metric: str) -> bool:
    return metric in table.values.get(model, {}) or metric in table.sets.get(model, {})


def _interval(table: MetricTable, model: str, metric: str) -> Interval:
    return table.interval(model, metric) if _has(table, model, metric) else Interval(np.nan, np.nan, np.nan, 0)


def _hero(table: MetricTable) -> list[dict[str, Any]]:
    """Returns for each model the first metric's mean, and the difference to the model before."""
    metric, out = table.metrics[0], []
    for before, model in zip([None, *table.models], table.models, strict=False):
        change = None if before is None else _difference(table, metric, table.difference(model, metric, before))
        out.append(
            {
                "model": model,
                "label": table.label(metric),
                "cell": _cell(table.interval(model, metric), table.value(metric)),
                "change": change,
                "before": before,
            }
        )
    return out


def _losses(table: MetricTable) -> list[tuple[str, str, Cell | None]]:
    """Returns the significant losses of each model against the one before, as (pair, metric, difference)."""
    return [
        (f"{model} - {before}", table.label(k), _difference(table, k, change))
        for before, model in zip(table.models, table.models[1:], strict=False)
        for k, change in table.significant(model, before)[1].items()
    ]


def _head_and_rest(text: str) -> tuple[str, str]:
    head, colon, rest = text.partition(": ")
    return head, colon + rest


def _breakdown_differences(table: MetricTable) -> list[tuple[str, Grid]]:
    """Returns the paired differences of the breakdowns as ``(title, grid)``."""
    grids = []
    for metric in table.main_breakdowns:
        for title, groups in table.breakdowns(metric, paired=True).items():
            pairs = list(next(iter(groups.values())))
            rows = [(name, [_difference(table, metric, row[p]) for p in pairs]) for name, row in groups.items()]
            grids.append((title, Grid(pairs, rows)))
    return grids


def _examples(
    table: MetricTable | None, models: Sequence[str], examples: Sequence[Example], budget: int
) -> dict[str, Any]:
    """Returns the examples, and the choices to filter and sort them by."""
    shown = [[model for model in models if model in example.images] for example in examples]
    images = [e.images[model] for e, names in zip(examples, shown, strict=True) for model in names]
    urls = encode_all(images, budget)
    scores = [s for e in examples for row in e.scores.values() for s in row]
    edges = np.quantile(scores, np.arange(1, SCORE_BINS) / SCORE_BINS) if scores else np.array([])
    metric = table.metrics[0] if table and table.metrics else None
    used, out = 0, []
    for example, names in zip(examples, shown, strict=True):
        used += len(names)
        if used > len(urls):
            break
        links = dict(zip(names, urls[used - len(names) : used], strict=True))
        out.append(_example(example, links, edges, _row(table, metric, example.row)))
    lengths = sorted({e["length"] for e in out}, key=natural_key)
    pairs = [f"{m} - {o}" for m, o in table.pairs] if table and metric and any(e["changes"] for e in out) else []
    return {
        "examples": out,
        "left_out": len(examples) - len(out),
        "lengths": lengths,
        "sorted_pairs": pairs,
        "sort_label": table.label(metric) if table and metric else "",
        "has_verdicts": any(e.verdicts for e in examples),
        "has_truncated": any(any(e.truncated.values()) for e in examples),
        "score_edges": [f"{edge:.3f}" for edge in edges],
    }


def _row(table: MetricTable | None, metric: str | None, row: int | None) -> dict[str, Any]:
    """Returns the first metric of each model's image, and the paired gains in the order of the table's pairs."""
    if table is None or metric is None or row is None or metric not in table.values[table.base]:
        return {"values": {}, "changes": ""}
    values = {m: float(table.values[m][metric][row]) for m in table.models if metric in table.values[m]}
    sign = -1 if table.value(metric).direction == "lower" else 1
    changes = [sign * (values.get(m, np.nan) - values.get(o, np.nan)) for m, o in table.pairs]
    return {
        "values": {m: number(v, table.value(metric)) for m, v in values.items()},
        "changes": ",".join("" if np.isnan(c) else f"{c:.4f}" for c in changes),
    }


def _example(example: Example, urls: Mapping[str, str], edges: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
    text = " ".join(example.sentences)
    images = []
    for model, url in urls.items():
        facts = [fact for sentence in example.verdicts.get(model, ()) for fact in sentence]
        count = f"{sum(facts)} of {len(facts)} facts" if facts else row["values"].get(model, "")
        images.append({"model": model, "url": url, "note": count})
    names = example.facts or [()] * len(example.sentences)
    rows = [
        (sentence, " | ".join(names[i]), [_chip(example, model, i, edges) for model in urls])
        for i, sentence in enumerate(example.sentences)
    ]
    return {
        "seed": example.seed,
        "words": len(text.split()),
        "length": length_labels([text], LENGTH_EDGES)[0],
        "images": images,
        "rows": rows,
        "changes": row["changes"],
    }


def _chip(example: Example, model: str, sentence: int, edges: np.ndarray) -> Chip:
    kind, count, digits, score = [], "", "", ""
    if facts := example.verdicts.get(model, ()):
        facts = facts[sentence]
        kind += ["true" if all(facts) else "part" if any(facts) else "false"] if facts else []
        count, digits = f"{sum(facts)}/{len(facts)}" if facts else "-", "".join("01"[bool(f)] for f in facts)
    if scores := example.scores.get(model, ()):
        score = f"{scores[sentence]:.3f}"
        kind.append(f"s{np.searchsorted(edges, scores[sentence])}")
    if sentence in example.truncated.get(model, ()):
        kind.append("truncated")
    return Chip(" ".join(kind), count, digits, score)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
