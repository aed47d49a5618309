"""Scores and facts of each sentence of the prompts, stored with a table to be shown in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longalign.evaluation.measure import batches
from longalign.metrics import FactMetric, RewardMetric
from longalign.metrics.base import Metric, Observations


@dataclass(frozen=True)
class Sentences:
    """The sentences of the prompts of a table's images, and what the images show of them.

    Attributes:
        texts: image -> sentences of its prompt.
        facts: image -> sentence -> names of its facts; empty if unknown.
        verdicts: model -> image -> sentence -> whether each fact holds.
        scores: model -> image -> sentence -> cosine with the image.
        score_name: name of the scores.
    """

    texts: Sequence[Sequence[str]] = ()
    facts: Sequence[Sequence[Sequence[str]]] = ()
    verdicts: Mapping[str, Sequence[Sequence[Sequence[bool]]]] = field(default_factory=dict)
    scores: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    score_name: str = ""


def sentence_metrics(metrics: Sequence[Metric]) -> tuple[FactMetric | None, RewardMetric | None]:
    """Returns the first metric of facts, and the first reward metric with ``segments``."""
    facts = next((m for m in metrics if isinstance(m, FactMetric)), None)
    return facts, next((m for m in metrics if isinstance(m, RewardMetric) and m.segments), None)


def image_features(
    metric: RewardMetric | None, metrics: Sequence[Metric], observed: Mapping[str, Sequence[Observations]]
) -> dict[str, np.ndarray]:
    """Returns model -> image embeddings ``(n, d)``, as far as the metric observed them.

    Args:
        metric: one of the metrics; None for none.
        metrics: the metrics.
        observed: model -> observations of each metric.
    """
    if metric is None:
        return {}
    index = next(i for i, other in enumerate(metrics) if other is metric)
    return {model: rows[index]["image"] for model, rows in observed.items() if "image" in rows[index]}


@torch.no_grad()
def measure_sentences(
    models: Mapping[str, Tensor | Sequence[Tensor]],
    prompts: Sequence[str],
    facts: FactMetric | None = None,
    reward: RewardMetric | None = None,
    batch_size: int = 16,
    features: Mapping[str, np.ndarray] | None = None,
) -> Sentences:
    """Measures each sentence of the prompts in the images of several models.

    With ``facts``, sentences are those of the captions. Else they are the segments of the reward's ``by_segment``.

    Args:
        models: name -> images, as for `longalign.evaluation.evaluate`.
        prompts: one per image.
        facts: reads the facts; None for none.
        reward: scores the sentences; None for no scores.
        batch_size: images per call.
        features: model -> observations ``(n, d)`` of the images by the reward, see `image_features`. The image tower
            runs for other models only.

    Raises:
        ValueError: if the numbers of images and prompts differ, or a prompt is not among the captions of ``facts``.
    """
    if facts is None and reward is None:
        return Sentences()
    texts: list[list[str]] = [[] for _ in prompts]
    verdicts: dict[str, list[Any]] = {}
    scores: dict[str, list[Any]] = {}
    for model, images in models.items():
        known = (features or {}).get(model)
        shown: list[Any] = [[] for _ in prompts]
        cosines: list[Any] = [[] for _ in prompts]
        for rows, batch, batch_prompts in batches(images, prompts, batch_size):
            if facts is not None:
                for i, verdict in zip(rows, facts.verdicts(batch, batch_prompts), strict=True):
                    shown[i] = verdict
                    texts[i] = [sentence.text for sentence in facts.caption(prompts[i]).sentences]
            if reward is None:
                continue
            embedded = None if known is None else torch.from_numpy(known[rows])
            if facts is None:
                for i, row in zip(rows, reward.by_segment(batch, batch_prompts, embedded), strict=True):
                    texts[i], cosines[i] = [text for text, _ in row], [score for _, score in row]
                continue
            for i, row in zip(rows, reward.cosines(batch, [texts[i] for i in rows], embedded), strict=True):
                cosines[i] = row
        if facts is not None:
            verdicts[model] = shown
        if reward is not None:
            scores[model] = cosines
    names = [] if facts is None else [_fact_names(facts.caption(prompt)) for prompt in prompts]
    return Sentences(texts, names, verdicts, scores, "" if reward is None else reward.label)


def _fact_names(caption: Any) -> list[list[str]]:
    return [[" ".join(filter(None, (f.kind, f.value))) for f in sentence.facts] for sentence in caption.sentences]


def truncated_sentences(sentences: Sequence[str], truncated: str | None) -> frozenset[int]:
    """Returns the indices of the sentences that are truncated, partly or completely.

    Args:
        sentences: the sentences of a prompt.
        truncated: the end of the prompt that was truncated. Spaces do not count, since encoders may drop them at
            splits.
    """
    length = len("".join("".join(sentences).split())) - len("".join((truncated or "").split()))
    indices, end = set(), 0
    for i, sentence in enumerate(sentences):
        end += len("".join(sentence.split()))
        if end > length:
            indices.add(i)
    return frozenset(indices)
