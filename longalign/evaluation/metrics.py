"""Metrics of images: rewards, their text-relevant and text-irrelevant parts, and fact accuracy.

A metric is any callable ``(images (b, 3, h, w) in [0, 1], prompts) -> {name: (b,)}``, NaN where an image has no value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longalign.evaluation.groups import natural_key
from longalign.evaluation.table import MetricTable
from longalign.functional.preference import common_direction, decompose, strict_relevance
from longalign.rewards.base import EmbeddingReward, Reward
from longalign.rewards.guard import guarded

Metric = Callable[[Tensor, Sequence[str]], Mapping[str, Any]]


class RewardMetric:
    """Reports a reward's score and its components (e.g. ``text_relevant``) as metrics.

    Args:
        name: name of the score in the table; a component is called ``name.component``.
        reward: a `Reward`, or a plain callable ``(images, prompts) -> (b,)``.
    """

    def __init__(self, name: str, reward: Reward | Callable[[Tensor, Sequence[str]], Tensor]):
        self.name, self.reward = name, reward
        self.names = (name,)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        if not isinstance(self.reward, Reward):
            return {self.name: self.reward(images, prompts)}
        scores = guarded(self.reward, images, prompts)
        return {self.name: scores.total, **{f"{self.name}.{k}": v for k, v in scores.parts.items()}}


class DecomposedMetric:
    """An embedding reward, decomposed along the common text direction (paper, section 4.1).

    Metrics: ``name`` (the plain score), ``text_relevant`` and ``text_irrelevant`` (they sum to the score), and
    ``name-o``: the cosine of the image with the text embedding's component orthogonal to the direction. With Denscore,
    this is Denscore-O of the paper's tables. The direction is the same for all models and batches.

    Args:
        name: name of the plain score in the table.
        reward: the embedding reward.
        corpus: prompts whose mean text embedding is the common direction, e.g. all prompts of the evaluation. At least
            two different ones: the text-relevant part of a single prompt is zero.
        batch_size: prompts per batch.
        prefix: prepended to ``text_relevant`` and ``text_irrelevant``, for a table with several rewards.

    Raises:
        ValueError: if the reward is not an embedding reward, or the corpus has fewer than two different prompts.
    """

    def __init__(
        self, name: str, reward: EmbeddingReward, corpus: Sequence[str], batch_size: int = 64, prefix: str = ""
    ):
        if not isinstance(reward, EmbeddingReward):
            raise ValueError(
                f"'{name}' is a {type(reward).__name__}; expected an EmbeddingReward; use RewardMetric for other "
                "rewards"
            )
        corpus = list(dict.fromkeys(corpus))
        if len(corpus) < 2:
            raise ValueError(
                f"the common direction needs at least two different prompts, got {len(corpus)}; add prompts, or use "
                "the plain score (RewardMetric, `longalign score`)"
            )
        self.name, self.reward = name, reward
        self.names = (name, f"{prefix}text_relevant", f"{prefix}text_irrelevant", f"{name}-o")
        with torch.no_grad():
            chunks = [reward.text_features(corpus[i : i + batch_size]) for i in range(0, len(corpus), batch_size)]
        self.direction = common_direction(torch.cat(chunks))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        image, text = self.reward.image_features(images), self.reward.text_features(prompts)
        parts = decompose(image, text, self.direction)
        strict = strict_relevance(image, text, self.direction)
        values = (parts.relevant + parts.irrelevant, parts.relevant, parts.irrelevant, strict)
        return dict(zip(self.names, values, strict=True))


class FactMetric:
    """Measures fact accuracy: the fraction of the caption's facts that hold in the image, read from the pixels.

    Metrics: ``facts``, and its breakdowns ``facts/attribute/<kind>`` and ``facts/by_position/<n>-<m>%``. The position
    is that of the fact's sentence in the caption, in percent of its sentences.

    Args:
        captions: captions of the synthetic scenes with their facts; a prompt is looked up by its text.
        quarters: number of position ranges.
    """

    def __init__(self, captions: Sequence[Any], quarters: int = 4):
        self.captions = {caption.text: caption for caption in captions}
        self.quarters = quarters

    def verdicts(self, images: Tensor, prompts: Sequence[str]) -> list[list[list[bool]]]:
        """Returns whether each fact holds in its image: image -> sentence -> fact -> bool.

        Raises:
            ValueError: if a prompt is not among the captions.
        """
        from longalign.mini import oracle

        missing = [p for p in prompts if p not in self.captions]
        if missing:
            raise ValueError(
                f"no facts for {len(missing)} prompts, e.g. {missing[0]!r}; expected prompts that are among the "
                "captions"
            )
        return oracle.verdicts(images.float().cpu().numpy(), [self.captions[p] for p in prompts])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        rows = []
        for prompt, verdict in zip(prompts, self.verdicts(images, prompts), strict=True):
            shown_by_name: dict[str, list[bool]] = {}
            sentences = self.captions[prompt].sentences
            for i, (sentence, facts_shown) in enumerate(zip(sentences, verdict, strict=True)):
                part = i * self.quarters // len(sentences)
                position = f"{100 * part // self.quarters}-{100 * (part + 1) // self.quarters}%"
                for fact, shown in zip(sentence.facts, facts_shown, strict=True):
                    for name in ("facts", f"facts/attribute/{fact.kind}", f"facts/by_position/{position}"):
                        shown_by_name.setdefault(name, []).append(shown)
            rows.append({name: float(np.mean(values)) for name, values in shown_by_name.items()})
        names = ["facts", *sorted({name for row in rows for name in row} - {"facts"}, key=_order)]
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def _order(name: str) -> tuple[str, tuple[int, int, str]]:
    group, _, last = name.rpartition("/")
    return group, natural_key(last)


def reward_metrics(rewards: Mapping[str, Reward], prompts: Sequence[str]) -> list[RewardMetric | DecomposedMetric]:
    """Returns a metric per reward. Embedding rewards are decomposed along the common direction of the prompts.

    With several embedding rewards the parts are called ``name.text_relevant`` and ``name.text_irrelevant``.

    Args:
        rewards: name in the table -> reward.
        prompts: prompts of the evaluation.

    Raises:
        ValueError: if an embedding reward has fewer than two different prompts, or two metrics have the same name.
    """
    several = sum(isinstance(reward, EmbeddingReward) for reward in rewards.values()) > 1
    metrics = [
        DecomposedMetric(name, reward, prompts, prefix=f"{name}." if several else "")
        if isinstance(reward, EmbeddingReward)
        else RewardMetric(name, reward)
        for name, reward in rewards.items()
    ]
    _check_names([metric.names for metric in metrics])
    return metrics


def _check_names(names: Sequence[Iterable[str]]) -> None:
    counts = Counter(name for metric_names in names for name in metric_names)
    if duplicates := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"two metrics are called {', '.join(duplicates)}; rename one of them")


@torch.no_grad()
def measure(
    images: Tensor | Sequence[Tensor], prompts: Sequence[str], metrics: Sequence[Metric], batch_size: int = 16
) -> dict[str, Any]:
    """Returns all metrics of one model's images: name -> ``(n,)`` float64 array.

    Args:
        images: ``(n, 3, h, w)`` in [0, 1], or a sequence of images ``(3, h, w)`` of any sizes, such as
            `longalign.image_io.ImageFiles`. Each image is read once.
        prompts: one prompt per image.
        metrics: see the module's docstring; their names must differ.
        batch_size: images per call; images of different sizes are in different calls.

    Raises:
        ValueError: if the numbers of images and prompts differ, or two metrics have the same name.
    """
    if len(images) != len(prompts):
        raise ValueError(f"expected one prompt per image, got {len(images)} images and {len(prompts)} prompts")
    results: list[dict[str, np.ndarray]] = [{} for _ in metrics]
    for start in range(0, len(prompts), batch_size):
        for rows, batch in _by_size(images, range(start, min(start + batch_size, len(prompts)))):
            batch_prompts = [prompts[i] for i in rows]
            for metric, result in zip(metrics, results, strict=True):
                for name, values in metric(batch, batch_prompts).items():
                    if isinstance(values, Tensor):
                        values = values.cpu().double().numpy()  # in this order: MPS has no float64
                    result.setdefault(name, np.full(len(prompts), np.nan))[rows] = np.asarray(values, np.float64)
        _check_names(results)
    return {name: values for result in results for name, values in result.items()}


def _by_size(images: Tensor | Sequence[Tensor], rows: Iterable[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Groups the selected images by size, as ``(indices, images)``."""
    groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for i in rows:
        image = images[i]
        groups.setdefault(image.shape, []).append((i, image))
    for group in groups.values():
        yield [i for i, _ in group], torch.stack([image for _, image in group])


def evaluate(
    models: Mapping[str, Tensor | Sequence[Tensor]],
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    seeds: Sequence[int] = (),
    batch_size: int = 16,
) -> MetricTable:
    """Measures several models on the same prompts and seeds. Differences are relative to the first model.

    Args:
        models: name -> images, see `measure`; the i-th image of each model has the i-th prompt and seed.
        prompts: the ``n`` prompts.
        metrics: see `measure`.
        seeds: the ``n`` seeds; recorded in the table only.
        batch_size: images per call.
    """
    values = {name: measure(images, prompts, metrics, batch_size) for name, images in models.items()}
    return MetricTable(values, list(prompts), list(seeds))
