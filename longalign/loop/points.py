"""Decisions from the measurements of a run's monitor: the best checkpoint, early stopping, warnings.

They depend only on the measurements, which are saved with each checkpoint. A resumed run therefore makes the same
decisions as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from longalign.config.monitor import EarlyStopConfig, GuardConfig, KeepBestConfig

#: minimum number of prompts for which a change is compared with its standard error
MIN_PROMPTS = 10


@dataclass
class Point:
    """One measurement of a run's monitor: the metrics of the held-out images after one training step.

    Attributes:
        step: number of completed optimizer steps.
        values: name of a value -> its mean over all images, or a statistic of all images. Always finite.
        directions: name of a value -> ``"higher"`` or ``"lower"``, whichever is better. None for a gauge: a value
            that is only watched, for which neither is better.
        training: result of `longalign.loop.monitor.training_values` for the steps since the previous measurement.
        rows: name of a value -> its mean over the images of each prompt, NaN where a prompt has no value. Emptied when
            `divergences` no longer needs it.
    """

    step: int
    values: dict[str, float]
    directions: dict[str, str | None]
    training: dict[str, float] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Returns the attributes as a dict of plain values; ``Point(**state)`` restores the measurement."""
        return asdict(self)

    def worsening(self, name: str, reference: Point) -> float:
        """Returns by how much the value ``name`` is worse here than in the measurement ``reference``.

        The result is in the value's unit: negative if the value is better, NaN if one of the two measurements has none.
        """
        change = self.values.get(name, math.nan) - reference.values.get(name, math.nan)
        return change if self.directions.get(name) == "lower" else -change


def best(points: Sequence[Point], choice: KeepBestConfig) -> Point | None:
    """Returns the measurement with the best value of ``choice.metric``; None if no measurement is accepted.

    ``choice.guard`` rejects measurements in which ``guard.metric`` is worse than in the first measurement by more than
    ``guard.at_most_worse``. Of several equal values, the first one is the best.
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
    """Returns the step of the `best` measurement, step 0 excluded because it has no checkpoint; None if there is none.

    ``choice.guard`` (see `best`) compares with the first measurement, even if this is the one at step 0.
    """
    trained = [p for p in points if p.step and _within(points, p, choice.guard)]
    found = best(trained, choice.model_copy(update={"guard": None}))
    return None if found is None else found.step


def is_over(points: Sequence[Point], choice: EarlyStopConfig) -> bool:
    """Returns whether none of the last ``choice.patience`` measurements is the `best`; False while there are fewer."""
    found = best(points, choice)
    since = len(points) if found is None else len(points) - 1 - points.index(found)
    return since >= choice.patience


def divergences(points: Sequence[Point], window: int) -> Iterator[str]:
    """Yields a warning for each metric that became worse between two measurements while the training reward rose.

    The images of a prompt have the same noise in both measurements. A metric became worse if its mean change over the
    prompts is for the worse and exceeds twice the standard error of this mean. Metrics with values of fewer than
    `MIN_PROMPTS` prompts are skipped. Also skipped are gauges (see `Point`), values of a subgroup (names with a slash)
    and statistics without a value per prompt.

    Args:
        points: all measurements so far.
        window: the last measurement is compared with the one that is ``window`` measurements earlier.
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
