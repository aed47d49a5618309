"""Decisions from the points of a monitor: best point, guard, early stopping, warnings."""

import math

import pytest

from longalign.config.monitor import EarlyStopConfig, GuardConfig, KeepBestConfig
from longalign.loop.points import Point, best_checkpoint, divergences, is_over


def points(values, guards=(), direction="higher"):
    guards = guards or [1.0] * len(values)
    directions = {"m": direction, "g": "higher"}
    return [
        Point(10 * i, {"m": m, "g": g} if not math.isnan(m) else {"g": g}, directions)
        for i, (m, g) in enumerate(zip(values, guards, strict=True))
    ]


GUARD = GuardConfig(metric="g", at_most_worse=0.1)


@pytest.mark.parametrize(
    ("values", "guards", "direction", "guarded", "unguarded"),
    [
        ([9, 1, 3, 2], (), "higher", 20, 20),
        ([9, 1, 3, 2], (), "lower", 10, 10),
        ([0, 3, 3], (), "higher", 10, 10),
        ([0, 1, 5], [1.0, 0.95, 0.5], "higher", 10, 20),
        ([0, 1, 5], [1.0, 0.5, 0.5], "higher", None, 20),
        ([0, math.nan], (), "higher", None, None),
        ([5], (), "higher", None, None),
    ],
)
def test_best_checkpoint_by_direction_and_guard(values, guards, direction, guarded, unguarded):
    measured = points(values, guards, direction)
    assert best_checkpoint(measured, KeepBestConfig(metric="m", guard=GUARD)) == guarded
    assert best_checkpoint(measured, KeepBestConfig(metric="m")) == unguarded


@pytest.mark.parametrize(
    ("values", "guards", "over"),
    [
        ([5, 4, 3], (), True),
        ([5, 4], (), False),
        ([1, 2, 2, 2], (), True),
        ([1, 2, 1, 3], (), False),
        ([1, 2, 3], [1.0, 0.5, 0.5], True),
    ],
)
def test_is_over_after_patience_points_without_accepted_gain(values, guards, over):
    assert is_over(points(values, guards), EarlyStopConfig(metric="m", patience=2, guard=GUARD)) is over


def trained(step, reward, rows, direction="higher"):
    return Point(step, {"m": sum(rows) / len(rows)}, {"m": direction}, {"reward": reward}, {"m": rows})


def test_divergences_warns_if_metric_falls_beyond_its_error_while_reward_rises():
    before = [0.8, 0.6] * 5
    after = [0.7, 0.48] * 5  # paired change -0.11, although the prompts differ by 0.2
    then, now = trained(10, 0.5, before), trained(30, 0.75, after)
    (message,) = divergences([then, trained(20, 0.6, before), now], 2)
    assert all(text in message for text in ("step 10 to 30", "0.5 to 0.75", "0.7 to 0.59", "-0.11", "10 prompts"))
    assert "keep_best" in message
    assert not list(divergences([then, now], 2))  # the window is longer
    assert not list(divergences([then, trained(30, 0.4, after)], 1))  # the reward falls too
    assert not list(divergences([now, trained(40, 0.8, before)], 1))  # the metric rises
    assert list(divergences([trained(1, 0, before, "lower"), trained(2, 1, [x + 0.1 for x in before], "lower")], 1))
    assert not list(divergences([trained(1, 0, before, None), trained(2, 1, after, None)], 1))  # a gauge


def test_divergences_ignores_noise_and_few_prompts():
    before = [0.8, 0.6] * 5
    assert not list(divergences([trained(1, 0, before), trained(2, 1, [0.5, 0.8] * 5)], 1))  # -0.3, +0.2
    assert not list(divergences([trained(1, 0, before[:9]), trained(2, 1, [0.1] * 9)], 1))
    start = Point(0, {"m": 0.9}, {"m": "higher"}, {}, {"m": [0.9] * 10})
    assert not list(divergences([start, trained(2, 1, before)], 1))  # no training reward at the start
