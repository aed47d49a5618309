"""Computes means with bootstrap intervals over prompts, noise seeds and training seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MIN_PROMPTS = 10
"""Minimum number of prompts for significance; with fewer, bootstrap intervals are too narrow."""
LEVEL = 0.95
"""Nominal probability that an interval contains the true mean."""
CHUNK = 200
"""Number of bootstrap samples whose means are computed in one matrix product, to limit memory."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval.

    Attributes:
        mean: the mean; NaN without values.
        low: lower end of the interval; NaN without values.
        high: upper end of the interval; NaN without values.
        count: number of values.
        prompts: number of different prompts that the values belong to.
    """

    mean: float
    low: float
    high: float
    count: int
    prompts: int = 0

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero and comes from at least `MIN_PROMPTS` prompts."""
        return self.prompts >= MIN_PROMPTS and (self.low > 0 or self.high < 0)


EMPTY = Interval(math.nan, math.nan, math.nan, 0)


def resamples(groups: Sequence[str], samples: int, seed: int = 0) -> np.ndarray:
    """Returns how often each of ``n`` values occurs in each bootstrap sample: ``(samples, n)``, uint16.

    Each sample is made in two steps. First, groups are sampled with replacement, e.g. prompts. Then the values of each
    sampled group, e.g. its images, are sampled with replacement, as many as the group has. Equal arguments give equal
    samples, which makes differences between models paired.

    Args:
        groups: the group of each of the ``n`` values, e.g. its prompt.
        samples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    number = {group: i for i, group in enumerate(sorted(set(groups)))}
    labels = np.array([number[group] for group in groups], np.int64)
    return _resamples(labels.tobytes(), samples, seed)


@lru_cache(maxsize=8)  # all metrics of a table have the same groups
def _resamples(labels_bytes: bytes, samples: int, seed: int) -> np.ndarray:
    labels = np.frombuffer(labels_bytes, np.int64)
    sizes = np.bincount(labels)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sizes), size=len(sizes)) for _ in range(samples))
    drawn = np.stack([np.bincount(draw, minlength=len(sizes)) for draw in draws])
    counts = drawn[:, labels].astype(np.uint16)
    order = np.argsort(labels, kind="stable")
    for size in np.unique(sizes[sizes > 1]):
        chosen = np.flatnonzero(sizes == size)
        members = order[np.isin(labels[order], chosen)]  # by group
        within = rng.multinomial(drawn[:, chosen] * size, np.full(size, 1 / size))
        counts[:, members] = within.reshape(samples, -1)
    counts.flags.writeable = False
    return counts


def block_counts(blocks: int, samples: int, seed: int = 0) -> np.ndarray:
    """Returns how often each training seed occurs in each bootstrap sample: int64 ``(samples, blocks)``.

    Each bootstrap sample contains ``blocks - 1`` training seeds, sampled with replacement. The variance of the mean is
    then unbiased; with ``blocks`` training seeds per bootstrap sample, it would be too small by the factor
    ``(blocks - 1) / blocks`` (Rao and Wu, Resampling Inference With Complex Survey Data, 1988). If ``blocks`` is 1, the
    result is 1 everywhere.

    Args:
        blocks: number of training seeds.
        samples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    if blocks == 1:
        return np.ones((samples, 1), np.int64)
    return np.random.default_rng([seed, 1]).multinomial(blocks - 1, np.full(blocks, 1 / blocks), samples)


def bootstrap(
    values: np.ndarray,
    groups: Sequence[str] | None = None,
    samples: int = 2000,
    seed: int = 0,
    blocks: Sequence[int] | None = None,
) -> Interval:
    """Returns the mean of ``values`` with a 95% percentile bootstrap interval.

    With differences of two models on the same prompts and seeds as values, this is the paired bootstrap.

    Args:
        values: ``(n,)``; NaN values are skipped.
        groups: the group of each value, such as the prompt of its image, since images of one prompt are not
            independent; see `resamples`. None resamples single values.
        samples: number of bootstrap samples.
        seed: seed of the resampling; the same values always give the same interval.
        blocks: the training seed of each value, to resample training seeds too, see `block_counts`. The i-th images of
            a prompt have the same noise for all training seeds, so they are sampled together. None for models that were
            trained once.
    """
    values = np.asarray(values, dtype=np.float64)
    groups = [f"{i:09d}" for i in range(len(values))] if groups is None else list(groups)
    valid = ~np.isnan(values)
    values, groups = values[valid], [group for group, keep in zip(groups, valid, strict=True) if keep]
    if not len(values):
        return EMPTY
    if blocks is None:
        columns, drawn = resamples(groups, samples, seed), None
    else:
        names, block = np.unique(np.asarray(blocks)[valid], return_inverse=True)
        units, unit_groups = _units(groups, block)
        columns = resamples(unit_groups, samples, seed)[:, units]
        drawn = block_counts(len(names), samples, seed)[:, block].astype(np.uint16)
    means = []
    for i in range(0, samples, CHUNK):
        weights = columns[i : i + CHUNK].astype(np.float64)
        if drawn is not None:
            weights *= drawn[i : i + CHUNK]
        with np.errstate(invalid="ignore"):  # no value in the sampled blocks: NaN, skipped
            means.append(weights @ values / weights.sum(1))
    return interval(float(values.mean()), np.concatenate(means), len(values), len(set(groups)))


def _units(groups: Sequence[str], block: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers the units that are sampled as a whole: the i-th values of a group in all blocks form one unit.

    Returns the unit of each value, ``(n,)``, and the group of each unit.
    """
    seen: Counter[tuple[str, int]] = Counter()
    numbers: dict[tuple[str, int], int] = {}
    units = []
    for group, at in zip(groups, block.tolist(), strict=True):
        units.append(numbers.setdefault((group, seen[group, at]), len(numbers)))
        seen[group, at] += 1
    return np.array(units), [group for group, _ in numbers]


def interval(value: float, resampled: np.ndarray, count: int, prompts: int) -> Interval:
    """Returns the `Interval` between the 2.5% and the 97.5% quantile of the values of bootstrap samples.

    Args:
        value: the value of all images, the ``mean`` of the result.
        resampled: ``(samples,)``, the value of each bootstrap sample; NaN is skipped.
        count: number of images.
        prompts: number of different prompts.
    """
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), count, prompts)
