"""Measures the images of one or several models with metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longalign.evaluation.bootstrap import resamples
from longalign.evaluation.table import MetricTable
from longalign.metrics.base import Metric, Observations, Statistic, Value, as_metric

SET_SAMPLES = 200
"""Number of bootstrap samples of metrics that only a set of images has; they are slower to compute than means."""


@torch.no_grad()
def observe(
    images: Tensor | Sequence[Tensor], prompts: Sequence[str], metrics: Sequence[Metric], batch_size: int = 16
) -> list[Observations]:
    """Returns what each metric reads from the images of one model (its observations), see `Metric.observe`.

    Args:
        images: ``(n, 3, h, w)`` in [0, 1], or a sequence of ``n`` images ``(3, h, w)`` of any sizes, such as
            `longalign.image_io.ImageFiles`. Each image is read once.
        prompts: the ``n`` prompts.
        metrics: the metrics.
        batch_size: number of images per call of a metric; images of different sizes are in different calls.

    Returns:
        For each metric, name -> float64 ``(n,)`` or float32 ``(n, d)``, NaN where an image has no value.

    Raises:
        ValueError: if the numbers of images and prompts differ, or an observation has a wrong shape or infinities.
    """
    results: list[dict[str, np.ndarray]] = [{} for _ in metrics]
    for rows, batch, batch_prompts in batches(images, prompts, batch_size):
        for metric, result in zip(metrics, results, strict=True):
            for name, values in metric.observe(batch, batch_prompts).items():
                array = _checked(f"'{name}' of the metric '{metric.label}'", values, len(rows))
                if name not in result:
                    result[name] = np.full((len(prompts), *array.shape[1:]), np.nan, array.dtype)
                result[name][rows] = array
    return list(results)


def _checked(where: str, values: Any, count: int) -> np.ndarray:
    """Returns observations of ``count`` images as float64 ``(count,)`` or float32 ``(count, d)``.

    Raises:
        ValueError: if the shape is different, or a number is infinite. The message starts with ``where``.
    """
    array = values.float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim not in (1, 2) or len(array) != count:
        raise ValueError(f"{where} has shape {array.shape}; expected ({count},) or ({count}, d): one row per image")
    if np.isinf(array).any():
        raise ValueError(f"{where} is infinite; expected finite numbers, or NaN where an image has no value")
    return array.astype(np.float64 if array.ndim == 1 else np.float32)


def batches(
    images: Tensor | Sequence[Tensor], prompts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], Tensor, list[str]]]:
    """Yields batches of at most ``batch_size`` images of one size, as (indices, images ``(b, 3, h, w)``, prompts).

    Args:
        images: ``(n, 3, h, w)``, or a sequence of ``n`` images ``(3, h, w)`` of any sizes, to which the indices refer.
        prompts: the ``n`` prompts.
        batch_size: maximum number of images in a batch.

    Raises:
        ValueError: if the numbers of images and prompts differ.
    """
    if len(images) != len(prompts):
        raise ValueError(f"expected one prompt per image, got {len(images)} images and {len(prompts)} prompts")
    for start in range(0, len(images), batch_size):
        groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for i in range(start, min(start + batch_size, len(images))):
            image = images[i]
            groups.setdefault(image.shape, []).append((i, image))
        for group in groups.values():
            rows = [i for i, _ in group]
            yield rows, torch.stack([image for _, image in group]), [prompts[i] for i in rows]


def measure(
    images: Tensor | Sequence[Tensor],
    prompts: Sequence[str],
    metrics: Sequence[Metric | Callable[..., Any]],
    seeds: Sequence[int] = (),
    batch_size: int = 16,
) -> dict[str, np.ndarray]:
    """Returns the metric values of one model's images: name -> float64 ``(n,)``, NaN where an image has no value.

    Values that only a set of images has, such as a Frechet distance, are not included; `summarize` has them.

    Args:
        images: ``(n, 3, h, w)`` in [0, 1], or a sequence of ``n`` images ``(3, h, w)`` of any sizes.
        prompts: the ``n`` prompts.
        metrics: metrics, or functions ``(images (b, 3, h, w), prompts) -> {name: (b,)}``.
        seeds: the ``n`` noise seeds; empty if unknown.
        batch_size: number of images per call of a metric.

    Raises:
        ValueError: if the numbers of images and prompts differ, a metric returns a wrong shape or infinities, or two
            metrics have a value of the same name.
    """
    built = [as_metric(metric) for metric in metrics]
    finished = _finish(built, observe(images, prompts, built, batch_size), prompts, seeds)
    return {name: rows for values in finished for name, rows in values.items()}


@dataclass(frozen=True)
class Summary:
    """The value of one metric for a set of images.

    Attributes:
        mean: mean over the images that have a value, or the value of the set as a whole; NaN if there is none.
        shown: unit, and whether higher or lower is better.
        rows: ``(n,)`` value of each image, NaN where it has none; None if only the set as a whole has a value.
    """

    mean: float
    shown: Value
    rows: np.ndarray | None


def summarize(
    images: Tensor | Sequence[Tensor],
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    seeds: Sequence[int] = (),
    batch_size: int = 16,
) -> dict[str, Summary]:
    """Returns the values of one model's images without intervals, as name -> `Summary`.

    Values that only a set of images has, such as a Frechet distance, are included.

    Args:
        images: ``(n, 3, h, w)`` in [0, 1], or a sequence of ``n`` images ``(3, h, w)`` of any sizes.
        prompts: the ``n`` prompts.
        metrics: the metrics.
        seeds: the ``n`` noise seeds; empty if unknown.
        batch_size: number of images per call of a metric.

    Raises:
        ValueError: if the numbers of images and prompts differ, a metric returns a wrong shape or infinities, or two
            metrics have a value of the same name.
    """
    observed = observe(images, prompts, metrics, batch_size)
    out: dict[str, Summary] = {}
    for metric, rows, finished in zip(metrics, observed, _finish(metrics, observed, prompts, seeds), strict=True):
        for name, values in finished.items():
            known = values[~np.isnan(values)]
            out[name] = Summary(float(known.mean()) if len(known) else math.nan, metric.value(name), values)
        for name, function in metric.statistics().items():
            out[name] = Summary(float(function(rows)), metric.value(name), None)
    return out


def _finish(
    metrics: Sequence[Metric], observed: Sequence[Observations], prompts: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, np.ndarray]]:
    """Returns the values of each metric, name -> ``(n,)``, given its observations, see `Metric.finish`.

    Raises:
        ValueError: if two metrics have a value of the same name.
    """
    finished = [metric.finish(rows, prompts, seeds) for metric, rows in zip(metrics, observed, strict=True)]
    counts = Counter(
        name for metric, values in zip(metrics, finished, strict=True) for name in [*values, *metric.statistics()]
    )
    if duplicates := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"two values are called {', '.join(duplicates)}; give one of the two metrics another `label`")
    return [{name: np.asarray(rows, np.float64) for name, rows in values.items()} for values in finished]


def evaluate(
    models: Mapping[str, Tensor | Sequence[Tensor]],
    prompts: Sequence[str],
    metrics: Sequence[Metric | Callable[..., Any]],
    seeds: Sequence[int] = (),
    batch_size: int = 16,
) -> MetricTable:
    """Measures the images of several models on the same prompts and seeds. The first model is the base of comparisons.

    Args:
        models: name -> images, ``(n, 3, h, w)`` in [0, 1] or a sequence of ``n`` images ``(3, h, w)`` of any sizes. The
            i-th image of each model has the i-th prompt and seed.
        prompts: the ``n`` prompts.
        metrics: metrics, or functions ``(images (b, 3, h, w), prompts) -> {name: (b,)}``.
        seeds: the ``n`` noise seeds; empty if unknown.
        batch_size: number of images per call of a metric.

    Raises:
        ValueError: if the numbers of images and prompts differ, a metric returns a wrong shape or infinities, or two
            metrics have a value of the same name.
    """
    built = [as_metric(metric) for metric in metrics]
    observed = {model: observe(images, prompts, built, batch_size) for model, images in models.items()}
    return tabulate(observed, prompts, built, seeds)


def tabulate(
    observed: Mapping[str, Sequence[Observations]],
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    seeds: Sequence[int] = (),
) -> MetricTable:
    """Returns the table of `evaluate`, given the outputs of `observe`.

    Args:
        observed: name of a model -> output of `observe` for the images of this model.
        prompts: the ``n`` prompts.
        metrics: the metrics, in the order of the observations.
        seeds: the ``n`` noise seeds; empty if unknown.

    Raises:
        ValueError: if two metrics have a value of the same name.
    """
    values: dict[str, dict[str, np.ndarray]] = {model: {} for model in observed}
    sets: dict[str, dict[str, np.ndarray]] = {model: {} for model in observed}
    shown: dict[str, Value] = {}
    for model, of_metrics in observed.items():
        for metric, rows, finished in zip(
            metrics, of_metrics, _finish(metrics, of_metrics, prompts, seeds), strict=True
        ):
            statistics = {name: _resampled(function, rows, prompts) for name, function in metric.statistics().items()}
            shown |= {name: metric.value(name) for name in (*finished, *statistics)}
            values[model] |= finished
            sets[model] |= statistics
    return MetricTable(values, list(prompts), list(seeds), shown, sets)


def _resampled(function: Statistic, observations: Observations, prompts: Sequence[str]) -> np.ndarray:
    """Returns the value of a statistic for all images, then for each bootstrap sample: ``(1 + SET_SAMPLES,)``.

    A bootstrap sample has fewer different images, which shifts e.g. a Frechet distance. Therefore, the values of the
    samples are shifted so that their mean is the value for all images. A sample without a value is NaN.
    """
    value = float(function(observations))
    if math.isnan(value):
        return np.full(1 + SET_SAMPLES, math.nan)
    draws = (np.repeat(np.arange(len(prompts)), counts) for counts in resamples(prompts, SET_SAMPLES))
    samples = np.array([function({name: rows[draw] for name, rows in observations.items()}) for draw in draws])
    return np.array([value, *(samples - np.nanmean(samples) + value)], np.float64)
