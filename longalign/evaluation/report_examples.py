"""Prepares the images of the report, and the markers (chips) that show which sentences each image depicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from longalign.evaluation.formatting import number
from longalign.evaluation.groups import LENGTH_EDGES, length_labels
from longalign.evaluation.report_images import encode_all
from longalign.evaluation.table import MetricTable
from longalign.names import natural_key

SCORE_BINS = 5
"""Number of colours of the scores. Each colour has about the same number of scores on the page."""


@dataclass(frozen=True)
class Example:
    """What the report shows of one prompt: its sentences, and the image of each model from one noise seed.

    A fact is one statement of a sentence about a synthetic scene, such as the colour of an object. ``verdicts``,
    ``scores``, ``truncated`` and ``facts`` are empty if unknown.

    Attributes:
        sentences: the sentences of the prompt.
        seed: seed of the noise; None if unknown.
        images: name of a model -> its image ``(3, h, w)`` in [0, 1], or the path of the image file.
        verdicts: name of a model -> for each sentence, for each of its facts: whether the fact holds in the image.
        scores: name of a model -> for each sentence, the score of a reward, such as the cosine similarity with the
            image.
        truncated: name of a model -> indices of the sentences that its encoder truncated, partly or completely.
        facts: for each sentence, the names of its facts.
        row: index of the prompt and seed in the metric table; None if they are not in the table.
    """

    sentences: Sequence[str]
    seed: int | None
    images: Mapping[str, Tensor | Path]
    verdicts: Mapping[str, Sequence[Sequence[bool]]] = field(default_factory=dict)
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    truncated: Mapping[str, frozenset[int]] = field(default_factory=dict)
    facts: Sequence[Sequence[str]] = ()
    row: int | None = None


class Chip(NamedTuple):
    """A marker on the page: the result of one model's image for one sentence. Texts are empty if unknown.

    Attributes:
        kind: CSS classes, separated by spaces: ``true``, ``part`` or ``false`` if all, some or no facts hold; ``s0``
            (lowest fifth of the scores on the page) to ``s4`` (highest fifth); ``truncated`` for a truncated sentence.
        shown: number of facts that hold and of all facts, e.g. ``1/2``; ``-`` for a sentence without facts.
        facts: one digit per fact: 1 if it holds, else 0.
        score: the score with three decimals.
    """

    kind: str
    shown: str
    facts: str
    score: str


def examples_context(
    table: MetricTable | None, models: Sequence[str], examples: Sequence[Example], budget: int
) -> dict[str, Any]:
    """Returns the variables of the template ``report.html`` that show, filter and sort the examples.

    Args:
        table: metric table, for the values and differences of each image; None shows no values and differences.
        models: names of the models in their order on the page.
        examples: the examples. If their images exceed the budget, examples at the end are omitted; their number is the
            variable ``omitted``.
        budget: maximum number of bytes of all images together, before base64.
    """
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
        "omitted": len(examples) - len(out),
        "lengths": lengths,
        "sorted_pairs": pairs,
        "sort_label": table.label(metric) if table and metric else "",
        "has_verdicts": any(e.verdicts for e in examples),
        "has_chips": any(any(any(chip) for chip in chips) for e in out for _, _, chips in e["rows"]),
        "has_truncated": any(any(e.truncated.values()) for e in examples),
        "score_edges": [f"{edge:.3f}" for edge in edges],
    }


def _row(table: MetricTable | None, metric: str | None, row: int | None) -> dict[str, Any]:
    """Returns the value of ``metric`` for each model's image in a row of the table, and the differences of the pairs.

    The differences are in the order of `MetricTable.pairs`, separated by commas. They are positive if the first model
    of the pair is better.
    """
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
