"""Metrics over images and prompts: rewards, their text-relevant and irrelevant parts, and facts read from the pixels.

A metric is any callable ``(images (b, 3, h, w) in [0, 1], prompts) -> {name: (b,)}``, NaN where an image has no value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from longalign.image_io import load_image
from longalign.preference import common_direction, decompose, strict_relevance
from longalign.rewards.base import EmbeddingReward, Reward
from longalign.rewards.guard import guarded
from longalign.table import MetricTable

Metric = Callable[[Tensor, Sequence[str]], Mapping[str, Any]]


class RewardMetric:
    """A reward as a metric: its score, and the named parts that it reports.

    Args:
        name: what the score is called in the table; parts become ``name.part``.
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
    """An embedding reward and its decomposition about a common direction that is the same for every model and batch.

    Gives ``name`` (the plain score), ``text_relevant`` and ``text_irrelevant`` (which add up to it; paper section 4.1)
    and ``name-o``: the cosine of the image with the text's part across the direction, normalised (Denscore-O in the
    paper's tables when the reward is Denscore).

    Args:
        name: what the plain score is called in the table.
        reward: the embedding reward.
        corpus: prompts whose mean text embedding is the common direction, e.g. all prompts of the evaluation; at least
            two different ones, for the text-relevant part of a single prompt about itself is nothing.
        batch_size: prompts encoded at a time.
        prefix: put before ``text_relevant`` and ``text_irrelevant``, where a table has those of several rewards.
    """

    def __init__(
        self, name: str, reward: EmbeddingReward, corpus: Sequence[str], batch_size: int = 64, prefix: str = ""
    ):
        if not isinstance(reward, EmbeddingReward):
            raise ValueError(f"only embedding rewards decompose; '{name}' is {type(reward).__name__}, use RewardMetric")
        corpus = list(dict.fromkeys(corpus))
        if len(corpus) < 2:
            raise ValueError(
                f"the common direction needs at least two different prompts, got {len(corpus)}; add prompts, or take "
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
        found = (parts.relevant + parts.irrelevant, parts.relevant, parts.irrelevant, strict)
        return dict(zip(self.names, found, strict=True))


class FactMetric:
    """Share of the told facts that the image shows, read from the pixels by the small world's oracle.

    Gives ``facts``, and as shares ``facts/attribute/<kind>`` and ``facts/place in the prompt/<n>-<m>%``: where the
    sentence stands among the caption's sentences, in quarters, so that what is lost late in a long prompt shows.

    Args:
        captions: captions of the small world with their facts; a prompt is looked up by its text.
        quarters: number of parts a prompt is divided into.
    """

    def __init__(self, captions: Sequence[Any], quarters: int = 4):
        self.captions = {caption.text: caption for caption in captions}
        self.quarters = quarters

    def verdicts(self, images: Tensor, prompts: Sequence[str]) -> list[list[list[bool]]]:
        """For each image, for each sentence, for each fact told in it: whether the image shows it."""
        from longalign.mini import oracle

        missing = [p for p in prompts if p not in self.captions]
        if missing:
            raise ValueError(f"no facts are known for {len(missing)} prompts, the first is {missing[0]!r}")
        return oracle.verdicts(images.float().cpu().numpy(), [self.captions[p] for p in prompts])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        rows = []
        for prompt, verdict in zip(prompts, self.verdicts(images, prompts), strict=True):
            found: dict[str, list[bool]] = {}
            sentences = self.captions[prompt].sentences
            for i, (sentence, truths) in enumerate(zip(sentences, verdict, strict=True)):
                part = i * self.quarters // len(sentences)
                place = f"{100 * part // self.quarters}-{100 * (part + 1) // self.quarters}%"
                for fact, truth in zip(sentence.facts, truths, strict=True):
                    for name in ("facts", f"facts/attribute/{fact.kind}", f"facts/place in the prompt/{place}"):
                        found.setdefault(name, []).append(truth)
            rows.append({name: float(np.mean(values)) for name, values in found.items()})
        names = ["facts", *sorted({name for row in rows for name in row} - {"facts"}, key=_place)]
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def _place(name: str) -> tuple[str, int, str]:
    *group, last = name.split("/")
    digits = last.split("-")[0]
    return "/".join(group), int(digits) if digits.isdigit() else -1, last


def reward_metrics(rewards: Mapping[str, Reward], prompts: Sequence[str]) -> list[RewardMetric | DecomposedMetric]:
    """A metric for each reward: taken apart about the prompts' common direction where it is a product of embeddings.

    Where several are, their parts are called ``name.text_relevant`` and ``name.text_irrelevant``.

    Args:
        rewards: name in the table -> reward.
        prompts: of the evaluation.

    Raises:
        ValueError: if a reward is to be taken apart and there are no two different prompts, or two names are the same.
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
    counts = Counter(name for of_metric in names for name in of_metric)
    if taken := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"two metrics are called {', '.join(taken)}; give one of them another name")


@torch.no_grad()
def measure(
    images: Tensor | Sequence[Tensor], prompts: Sequence[str], metrics: Sequence[Metric], batch_size: int = 16
) -> dict[str, Any]:
    """All metrics of one model's images: name -> ``(n,)`` float64 array.

    Args:
        images: ``(n, 3, h, w)`` in [0, 1], or a sequence of images ``(3, h, w)`` of any sizes, each asked for once, as
            `longalign.image_io.ImageFiles`.
        prompts: one for each image.
        metrics: callables as described above; two that give the same name are refused.
        batch_size: images a call, of one size.
    """
    if len(images) != len(prompts):
        raise ValueError(f"expected one prompt per image, got {len(images)} images and {len(prompts)} prompts")
    found: list[dict[str, np.ndarray]] = [{} for _ in metrics]
    for start in range(0, len(prompts), batch_size):
        for rows, batch in _by_size(images, range(start, min(start + batch_size, len(prompts)))):
            batch_prompts = [prompts[i] for i in rows]
            for metric, of_metric in zip(metrics, found, strict=True):
                for name, values in metric(batch, batch_prompts).items():
                    if isinstance(values, Tensor):
                        values = values.cpu().double().numpy()  # in this order, for MPS has no float64
                    of_metric.setdefault(name, np.full(len(prompts), np.nan))[rows] = np.asarray(values, np.float64)
        _check_names(found)
    return {name: values for of_metric in found for name, values in of_metric.items()}


def _by_size(images: Tensor | Sequence[Tensor], rows: Iterable[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Some of the images, those of one size together, with their places."""
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
    """Measures several models' images of the same prompts and seeds; the first model is the base of all differences.

    Args:
        models: name -> images as `measure` takes them, the i-th drawn from the i-th prompt and seed by each model.
        prompts: the ``n`` prompts.
        metrics: see `measure`.
        seeds: the ``n`` seeds, kept in the table.
        batch_size: images a call.
    """
    values = {name: measure(images, prompts, metrics, batch_size) for name, images in models.items()}
    return MetricTable(values, list(prompts), list(seeds))


@torch.no_grad()
def score_images(
    rewards: Mapping[str, Any], paths: Sequence[Path | str], prompts: Sequence[str], out: TextIO | None = None
) -> list[dict[str, float | str]]:
    """Scores image files and prints one line for each and the means, tab-separated.

    Images are scored one at a time, so they may differ in size and no score depends on its neighbours; a reward whose
    direction comes from the batch is refused by the reward itself.

    Args:
        rewards: name -> `Reward` or plain callable.
        paths: image files.
        prompts: one for each file, or one for all of them.
        out: where to print; standard output if None.

    Returns:
        One dict for each image: ``image``, ``prompt`` and each score.
    """
    prompts = list(prompts) * len(paths) if len(prompts) == 1 else list(prompts)
    if len(paths) != len(prompts):
        raise ValueError(f"expected one prompt per image or one for all, got {len(prompts)} for {len(paths)} images")
    if not paths:
        raise ValueError("no images to score")
    metrics = [RewardMetric(name, reward) for name, reward in rewards.items()]
    rows: list[dict[str, float | str]] = []
    for path, prompt in zip(paths, prompts, strict=True):
        image = load_image(path)[None]
        scores = {k: float(v[0]) for metric in metrics for k, v in metric(image, [prompt]).items()}
        if not rows:
            print("\t".join([*scores, "image"]), file=out)
        print("\t".join([*(f"{v:.4f}" for v in scores.values()), str(path)]), file=out, flush=True)
        rows.append({"image": str(path), "prompt": prompt, **scores})
    names = [k for k in rows[0] if k not in ("image", "prompt")]
    means = [np.mean([float(row[k]) for row in rows]) for k in names]
    print("\t".join([*(f"{m:.4f}" for m in means), f"mean of {len(rows)}"]), file=out)
    return rows


def score_sentences(
    rewards: Mapping[str, Any], paths: Sequence[Path | str], prompts: Sequence[str], out: TextIO | None = None
) -> list[dict[str, float | str]]:
    """Scores image files against each sentence of their prompts and prints one line for each, tab-separated.

    Args:
        rewards: name -> `Reward` with ``by_segment``, or one around such a reward (``inner``), whose plain score it is.
        paths: image files.
        prompts: one for each file, or one for all of them.
        out: where to print; standard output if None.

    Returns:
        One dict for each sentence: ``score``, ``reward``, ``image`` and ``sentence``.
    """
    prompts = list(prompts) * len(paths) if len(prompts) == 1 else list(prompts)
    if len(paths) != len(prompts):
        raise ValueError(f"expected one prompt per image or one for all, got {len(prompts)} for {len(paths)} images")
    inner = {name: getattr(reward, "inner", reward) for name, reward in rewards.items()}
    without = [name for name, reward in inner.items() if not hasattr(reward, "by_segment")]
    if without:
        raise ValueError(f"{', '.join(without)} cannot score sentences; a reward with two towers can, such as denscore")
    rows: list[dict[str, float | str]] = []
    print("\t".join(["score", "reward", "image", "sentence"]), file=out)
    for path, prompt in zip(paths, prompts, strict=True):
        image = load_image(path)[None]
        for name, reward in inner.items():
            for sentence, score in reward.by_segment(image, [prompt])[0]:
                print("\t".join([f"{score:.4f}", name, str(path), " ".join(sentence.split())]), file=out, flush=True)
                rows.append({"score": score, "reward": name, "image": str(path), "sentence": sentence})
    return rows
