"""Decisions from the measurements of a run's monitor: the best checkpoint, early stopping, warnings.

They depend only on the measurements, which are saved with each checkpoint. A resumed run therefore decides as an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from longalign.config.monitor import EarlyStopConfig, GuardConfig, KeepBestConfig

#: fewest prompts for which a change is compared with its standard error
MIN_PROMPTS = 10


@dataclass
class Point:
    """One measurement of a monitor: the values at one training step.

    Attributes:
        step: number of completed optimizer steps.
        values: mean over all images by name, without names that have no value.
        directions: ``"higher"`` or ``"lower"`` is better by name; None for a gauge,
            for which neither is.
        training: mean training reward since the previous measurement, and its text-irrelevant share; empty at first.
        rows: mean over the images of each prompt by name, NaN where a prompt has no value.
    """

    step: int
    values: dict[str, float]
    directions: dict[str, str | None]
    training: dict[str, float] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Returns the attributes as plain values; ``Point(**state)`` restores the measurement."""
        return asdict(self)

    def worsening(self, name: str, reference: Point) -> float:
        """Returns by how much the value ``name`` is worse than in ``reference``; negative if better, NaN if unknown."""
        change = self.values.get(name, math.nan) - reference.values.get(name, math.nan)
        return change if self.directions.get(name) == "lower" else -change


def best(points: Sequence[Point], choice: KeepBestConfig) -> Point | None:
    """Returns the measurement with the best value of ``choice.metric`` that its guard accepts, else None.

    Of several equal values, the first one is the best.
    """
    found: Point | None = None
    for point in points:
        accepted = choice.metric in point.values and _within(points, point, choice.guard)
        if accepted and (found is None or point.worsening(choice.metric, found) < 0):
            found = point
    return found


def _within(points: Sequence[Point], point: Point, guard: GuardConfig | None) -> bool:
    return guard is None or point.worsening(guard.metric, points[0]) <= guard.at_most_worse


def best_checkpoint(points: Sequence[Point], choice: KeepBestConfig) -> int | None:
    """Returns the step of the best measurement as `best` does, but without step 0, which has no checkpoint.

    The guard still compares with the first measurement, which can be that of step 0.
    """
    trained = [p for p in points if p.step and _within(points, p, choice.guard)]
    found = best(trained, choice.model_copy(update={"guard": None}))
    return None if found is None else found.step


def is_over(points: Sequence[Point], choice: EarlyStopConfig) -> bool:
    """Returns whether none of the last ``patience`` measurements is a new best one."""
    found = best(points, choice)
    since = len(points) if found is None else len(points) - 1 - points.index(found)
    return since >= choice.patience


def divergences(points: Sequence[Point], window: int) -> Iterator[str]:
    """Yields a message for each metric that became worse over the window while the training reward rose.

    The change of a metric is the mean over its prompts, which have the same noise in both measurements. It counts if it
    exceeds twice its standard error over at least `MIN_PROMPTS` prompts. Breakdowns, gauges and values of sets are
    skipped.

    Args:
        points: all measurements so far.
        window: the last measurement is compared with the one ``window`` measurements before.
    """
    if len(points) <= window:
        return
    then, now = points[-1 - window], points[-1]
    if not now.training.get("reward", -math.inf) > then.training.get("reward", math.inf):
        return
    for name, direction in now.directions.items():
        if direction is None or "/" in name or not (name in then.rows and name in now.rows):
            continue
        change = np.array(now.rows[name]) - np.array(then.rows[name])
        change = change[np.isfinite(change)]
        if len(change) < MIN_PROMPTS:
            continue
        error = change.std(ddof=1) / len(change) ** 0.5
        worsening = change.mean() if direction == "lower" else -change.mean()
        if worsening > 2 * error:
            size, start = f"standard error {error:.2g}, {len(change)} prompts", f"the checkpoint of step {then.step}"
            yield (
                f"from step {then.step} to {now.step}, the training reward rose from {then.training['reward']:.4g} to "
                f"{now.training['reward']:.4g}, but {name} became worse on the held-out prompts: "
                f"{then.values[name]:.4g} to {now.values[name]:.4g} (paired change {change.mean():+.2g}, {size}). The "
                f"model may exploit the reward: use {start} or monitor.keep_best, train fewer steps, or lower loop.lr "
                "or the omega of a reweighted reward"
            )
