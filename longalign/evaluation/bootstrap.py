"""Computes means with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_PROMPTS = 10
"""Minimum number of prompts for significance; with fewer, bootstrap intervals are too narrow."""
CHUNK = 1_000_000
"""Resampled values in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval over ``count`` images of ``prompts`` prompts; NaN if there are no values."""

    mean: float
    low: float
    high: float
    count: int
    prompts: int = 0

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero and comes from at least `MIN_PROMPTS` prompts."""
        return self.prompts >= MIN_PROMPTS and (self.low > 0 or self.high < 0)


def bootstrap(
    values: np.ndarray, groups: Sequence[str] | None = None, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Returns the mean of ``values`` with a percentile bootstrap interval.

    If the values are paired differences, this is the paired bootstrap.

    Args:
        values: ``(n,)``; NaN values are skipped.
        groups: one label per value. Groups are resampled instead of values. Images of one prompt are not independent,
            so a prompt is resampled with all its images. None resamples single values.
        samples: number of bootstrap samples.
        level: coverage of the interval.
        seed: seed of the resampling; the same values always give the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    valid = ~np.isnan(values)
    if not valid.any():
        return Interval(math.nan, math.nan, math.nan, 0)
    labels = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(labels[valid], weights=values[valid])
    counts = np.bincount(labels[valid])
    sums, counts = sums[counts > 0], counts[counts > 0]
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(sums))
    resampled = (rng.integers(len(sums), size=(min(rows, samples - i), len(sums))) for i in range(0, samples, rows))
    means = np.concatenate([sums[index].sum(1) / counts[index].sum(1) for index in resampled])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values[valid].mean()), float(low), float(high), int(valid.sum()), len(sums))
