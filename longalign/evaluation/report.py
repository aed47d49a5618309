"""A self-contained HTML report of a run: metrics, image grids with verdicts, training curves, configs, machine."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from torch import Tensor

from longalign.evaluation import charts
from longalign.evaluation.record import machine, non_defaults, read_log
from longalign.evaluation.table import MIN_PROMPTS, Interval, MetricTable, is_fraction, label, number
from longalign.image_io import to_pil

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page loads nothing and runs no script, even if its texts contain markup."""
LONGEST_SIDE = 384
"""Pixels; larger images are downscaled to this before embedding."""


@dataclass(frozen=True)
class Example:
    """One prompt with the image of every model, from the same seed.

    Attributes:
        sentences: the sentences of the prompt.
        seed: seed of the noise.
        images: model -> image ``(3, h, w)`` in [0, 1].
        verdicts: model -> sentence -> fact -> whether the image shows the fact.
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
    sections = [
        f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>{_findings_list(table)}</header>",
        _metrics(table),
        _breakdowns(table),
        _examples(examples, table.models, score_name),
        _curves(logs or {}),
        _configs(configs or {}),
        _machine(seconds or {}),
    ]
    style = resources.files("longalign.evaluation").joinpath("report.css").read_text()
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(s for s in sections if s)
        + "\n</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def findings(table: MetricTable) -> list[str]:
    """Compares each model with the previous one, one plain-text sentence per model, with losses beside gains.

    A sentence starts with the first metric's mean and paired difference. Significant differences of its breakdowns
    (`MetricTable.breakdowns`) and of the other metrics follow.
    """
    metric = table.metrics[0]
    title, unit = label(metric).removesuffix(", %"), "%" if is_fraction(metric) else ""
    too_few = len(set(table.prompts)) < MIN_PROMPTS
    sentences = [f"{table.base}: {title} {_range(table.interval(table.base, metric), metric, unit)}."]
    for other, model in zip(table.models, table.models[1:], strict=False):
        name = f"{model} - {other}"
        gain = table.difference(model, metric, other)
        lines = [
            f"{model} against {other}: {title} {number(table.interval(model, metric).mean, metric)}{unit}, "
            + _change(gain, metric)
            + (" points" if unit else "")
            + ("" if gain.significant or too_few else ", no significant difference")
        ]
        changes = {
            (f"{heading.partition(' by ')[2]} {group}" if group[0].isdigit() else group): row[name]
            for heading, groups in table.breakdowns(metric, paired=True).items()
            for group, row in groups.items()
            if row[name].significant
        }
        if changes:
            worse = [f"{group} {_change(v, metric)}" for group, v in changes.items() if v.mean < 0]
            better = [group for group, v in changes.items() if v.mean > 0]
            lines.append("worse: " + (", ".join(worse) or "none"))
            lines.append("better: " + (", ".join(better) or "none"))
        others = {m: v for m in table.metrics[1:] if (v := table.difference(model, m, other)).significant}
        lines += [f"{label(m)} {_change(v, m)}" for m, v in others.items()]
        for m, relevant in others.items():
            irrelevant = others.get(m.replace("text_relevant", "text_irrelevant"))
            if m.endswith("text_relevant") and irrelevant and irrelevant.mean > relevant.mean > 0:
                ratio = irrelevant.mean / relevant.mean
                lines.append(f"the text-irrelevant part rises {ratio:.1f} times as much as the text-relevant part")
        sentences.append("; ".join(lines) + ".")
    if too_few:
        sentences.append(f"note: fewer than {MIN_PROMPTS} prompts, no difference is significant.")
    return sentences


def _range(interval: Interval, metric: str, unit: str = "") -> str:
    mean, low, high = (number(v, metric) for v in (interval.mean, interval.low, interval.high))
    return f"{mean}{unit} [{low}, {high}]"


def _change(interval: Interval, metric: str) -> str:
    mean, low, high = (number(v, metric, sign=True) for v in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _findings_list(table: MetricTable) -> str:
    """`findings` as an HTML list."""
    if len(table.models) < 2:
        return ""
    rows = []
    for text in findings(table):
        head, colon, rest = text.partition(": ")
        rows.append(f"<li><b>{escape(head)}</b>{colon}{escape(rest)}</li>")
    return f"<ul class='findings'>{''.join(rows)}</ul>"


def _dot(index: int) -> str:
    return f'<span class="dot model-{min(index, 3)}"></span>'


def _cell(interval: Interval, metric: str, difference: bool = False) -> str:
    if not interval.count:
        return "<td>-</td>"
    mean, low, high = (number(v, metric, difference) for v in (interval.mean, interval.low, interval.high))
    style = ' class="clear"' if difference and interval.significant else ""
    return f'<td><span{style}>{mean}</span><span class="range">{low} to {high}</span></td>'


def _metrics(table: MetricTable) -> str:
    head = "<tr><th></th>" + "".join(f"<th>{escape(label(m))}</th>" for m in table.metrics) + "</tr>"
    rows = []
    for i, model in enumerate(table.models):
        name = f'<th><span class="key">{_dot(i)}{escape(model)}</span></th>'
        rows.append(f"<tr>{name}{''.join(_cell(table.interval(model, m), m) for m in table.metrics)}</tr>")
    prompts, images = len(set(table.prompts)), len(table.prompts)
    counts = f"{prompts} prompts, {'one image each' if images == prompts else f'{images} images'}"
    parts = [
        f"<section><h2>Metrics</h2><p class='soft'>{counts}. All models share prompts and seeds. "
        "Ranges are 95% bootstrap intervals of the mean.</p>",
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>',
    ]
    if len(table.models) > 1:
        names = {f"{model} - {other}": (model, other) for model, other in table.pairs}
        columns = {
            label(m): {n: table.difference(model, m, other) for n, (model, other) in names.items()}
            for m in table.metrics
        }
        parts.append(
            "<h3>Differences</h3><p class='soft'>Paired over prompts and seeds; bold if the interval excludes zero "
            f"(at least {MIN_PROMPTS} prompts).</p>"
            + _differences(columns, dict(zip(columns, table.metrics, strict=True)))
        )
    return "".join(parts) + "</section>"


def _differences(columns: Mapping[str, Mapping[str, Interval]], metrics: Mapping[str, str]) -> str:
    """A table of paired differences: one row per pair of models, one column per label."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = [
        f"<tr><th>{escape(pair)}</th>"
        + "".join(_cell(row[pair], metrics[name], True) for name, row in columns.items())
        + "</tr>"
        for pair in next(iter(columns.values()))
    ]
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='scroll'><table>{body}</table></div>"


def _breakdowns(table: MetricTable) -> str:
    metrics = [m for m in table.metrics if table.submetrics(m)] or table.metrics[:1]
    figures = [
        charts.intervals(title, rows, lambda value, metric=metric: number(value, metric))
        for metric in metrics
        for title, rows in table.breakdowns(metric).items()
    ]
    if not figures:
        return ""
    body = f"<p>{_legend(table.models)}</p><div class='charts'>{''.join(figures)}</div>"
    body += "".join(
        f"<h3>Paired differences, {escape(title)}</h3>{_differences(groups, dict.fromkeys(groups, metric))}"
        for metric in metrics
        for title, groups in table.breakdowns(metric, paired=True).items()
    )
    return f"<section><h2>Breakdown</h2>{body}</section>"


def _legend(models: Sequence[str]) -> str:
    return "".join(f'<span class="key">{_dot(i)}{escape(m)}</span>' for i, m in enumerate(models))


def _examples(examples: Sequence[Example], models: Sequence[str], score_name: str) -> str:
    if not examples:
        return ""
    caption = "Each row is one sentence of the prompt."
    if any(e.verdicts for e in examples):
        caption += (
            " Chips count the facts of the sentence that the image shows: all (green), some (yellow), none (red)."
        )
    if any(e.scores for e in examples):
        caption += f" The small number is the image's {score_name} with that sentence alone."
    if any(e.truncated and any(e.truncated.values()) for e in examples):
        caption += " A dashed chip marks a sentence that the model's encoder truncated."
    body = "".join(_example(e, [m for m in models if m in e.images]) for e in examples)
    return f"<section><h2>Images</h2><p class='soft'>{escape(caption)}</p>{body}</section>"


def _example(example: Example, models: Sequence[str]) -> str:
    figures = []
    for i, model in enumerate(models):
        facts = [f for s in example.verdicts.get(model, ()) for f in s]
        count = f"<br>{sum(facts)} of {len(facts)} facts" if facts else ""
        figures.append(
            f'<figure><img src="{data_url(example.images[model])}" '
            f'alt="generated by {escape(model)}, seed {example.seed}">'
            f"<figcaption>{_dot(i)} <b>{escape(model)}</b>{count}</figcaption></figure>"
        )
    head = "".join(f'<th class="verdict">{escape(m).replace("+", "+<wbr>")}</th>' for m in models)
    rows = "".join(
        f"<tr><td>{escape(sentence)}</td>{''.join(_chip(example, model, i) for model in models)}</tr>"
        for i, sentence in enumerate(example.sentences)
    )
    return (
        f'<article class="example"><div class="images">{"".join(figures)}</div><table class="sentences"><thead><tr>'
        f'<th class="soft">seed {example.seed}</th>{head}</tr></thead><tbody>{rows}</tbody></table></article>'
    )


def _chip(example: Example, model: str, sentence: int) -> str:
    kind, lines = "", []
    if model in example.verdicts:
        facts = example.verdicts[model][sentence]
        kind = "" if not facts else "true" if all(facts) else "part" if any(facts) else "false"
        lines.append(f"{sum(facts)}/{len(facts)}" if facts else "-")
    if model in example.scores:
        lines.append(f"<small>{example.scores[model][sentence]:.3f}</small>")
    if sentence in example.truncated.get(model, ()):
        kind += " truncated"
        lines.append("<small>truncated</small>")
    return (
        f'<td class="verdict"><span class="chip {kind.strip()}">{"".join(lines)}</span></td>' if lines else "<td></td>"
    )


def data_url(image: Tensor) -> str:
    """An image ``(3, h, w)`` in [0, 1] as a PNG ``data:`` URL, at most `LONGEST_SIDE` pixels wide and high."""
    pil_image = to_pil(image)
    pil_image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    pil_image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(logs: Mapping[str, Path | str]) -> str:
    parts = []
    for stage, path in logs.items():
        if not Path(path).exists():
            parts.append(f"<h3>{escape(stage)}</h3><p class='soft'>No log: {escape(str(path))} does not exist.</p>")
            continue
        curves = {name.replace("_", "-"): curve for name, curve in read_log(path).items()}
        constant = [f"{name} {values[0]:g}" for name, (_, values) in curves.items() if len(set(values)) == 1]
        figures = [charts.curve(name, *curve) for name, curve in curves.items() if len(set(curve[1])) > 1]
        note = f"<p class='meta'>Constant: {escape(', '.join(constant))}.</p>" if constant else ""
        parts.append(f"<h3>{escape(stage)}</h3><div class='charts'>{''.join(figures)}</div>{note}")
    return f"<section><h2>Training</h2>{''.join(parts)}</section>" if parts else ""


def _configs(configs: Mapping[str, BaseModel]) -> str:
    def dump(value: Any) -> str:
        return escape(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))

    parts = [
        f"<details><summary>{escape(stage)}</summary>"
        f"<h3>Non-default values</h3><pre>{dump(non_defaults(config))}</pre>"
        f"<h3>Full config</h3><pre>{dump(config.model_dump(mode='json'))}</pre></details>"
        for stage, config in configs.items()
    ]
    return f"<section><h2>Configs</h2>{''.join(parts)}</section>" if parts else ""


def _machine(seconds: Mapping[str, float]) -> str:
    def rows(values: Mapping[str, str]) -> str:
        return "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in values.items())

    times = rows({stage: f"{value:.0f} s" for stage, value in seconds.items()})
    times = f"<h3>Time</h3><div class='scroll'><table><tbody>{times}</tbody></table></div>" if times else ""
    return (
        f"<section><h2>Machine</h2>{times}<h3>Versions</h3><div class='scroll'><table><tbody>{rows(machine())}"
        "</tbody></table></div></section>"
    )
