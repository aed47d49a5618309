"""Measures each sentence of the prompts: scores, and facts that hold. They are stored with a table, for the report."""

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
    """The sentences of prompts, and which of them the images of several models show.

    A fact is one statement of a sentence about a synthetic scene, such as the colour of an object. Below,
    ``image -> ...`` is a sequence with one entry per image, in the order of the metric table; ``sentence -> ...`` is a
    sequence with one entry per sentence.

    Attributes:
        texts: image -> sentences of its prompt.
        facts: image -> sentence -> names of its facts, e.g. "colour red"; empty without facts.
        verdicts: name of a model -> image -> sentence -> whether each fact holds in the image; empty without facts.
        scores: name of a model -> image -> sentence -> cosine similarity with the image; empty without a reward.
        score_name: name of the reward that computed ``scores``; empty without a reward.
    """

    texts: Sequence[Sequence[str]] = ()
    facts: Sequence[Sequence[Sequence[str]]] = ()
    verdicts: Mapping[str, Sequence[Sequence[Sequence[bool]]]] = field(default_factory=dict)
    scores: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    score_name: str = ""


def sentence_metrics(metrics: Sequence[Metric]) -> tuple[FactMetric | None, RewardMetric | None]:
    """Returns the metrics that measure sentences, each None if ``metrics`` has no such metric.

    They are the first `FactMetric`, and the first `RewardMetric` whose attribute ``segments`` is True.
    """
    facts = next((m for m in metrics if isinstance(m, FactMetric)), None)
    return facts, next((m for m in metrics if isinstance(m, RewardMetric) and m.segments), None)


def image_features(
    metric: RewardMetric | None, metrics: Sequence[Metric], observed: Mapping[str, Sequence[Observations]]
) -> dict[str, np.ndarray]:
    """Returns the image embeddings that a reward metric computed, as name of a model -> ``(n, d)``.

    Models whose observations have no embeddings are omitted.

    Args:
        metric: the reward metric, one of ``metrics``; None returns no embeddings.
        metrics: all metrics.
        observed: name of a model -> observations of each metric, see `longalign.evaluation.measure.observe`.
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

    With ``facts``, the sentences are those of the synthetic captions. Otherwise they are the segments into which the
    reward splits the prompts, see `longalign.rewards.TowerReward.by_segment`.

    Args:
        models: name -> ``n`` images, as for `longalign.evaluation.evaluate`.
        prompts: the ``n`` prompts, the same for all models.
        facts: metric that finds the facts that hold in an image; None measures no facts.
        reward: metric whose reward scores the sentences; None computes no scores. If ``facts`` is None too, the result
            is empty.
        batch_size: number of images per call of a metric.
        features: name of a model -> image embeddings ``(n, d)`` of the reward, see `image_features`. The reward's image
            tower runs only for models without an entry; None runs it for all models.

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
    """Returns the indices of the sentences of a prompt that an encoder truncated, partly or completely.

    Args:
        sentences: all sentences of the prompt.
        truncated: the end of the prompt that was not encoded; empty or None if nothing was truncated. Whitespace is
            ignored, since encoders may drop it where they split prompts.
    """
    length = len("".join("".join(sentences).split())) - len("".join((truncated or "").split()))
    indices, end = set(), 0
    for i, sentence in enumerate(sentences):
        end += len("".join(sentence.split()))
        if end > length:
            indices.add(i)
    return frozenset(indices)
