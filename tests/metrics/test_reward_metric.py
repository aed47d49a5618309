import numpy as np
import pytest
import torch
from toys import Brightness, Compass, colours

from longalign.evaluation.measure import evaluate, measure
from longalign.metrics import RewardMetric
from longalign.registry import metrics, rewards
from longalign.runtime import Runtime
from longalign.testing import check_metric
from longalign.testing.tiny import tiny_clip


def test_reward_metric_parts_sum_to_score():
    # the mean of the four texts is (0.8, 0, 0), so the common direction is the first axis
    prompts = ["east", "west", "up", "down", "east"]
    images = colours((1, 0, 0), (1, 0, 0), (1, 0, 0), (1, 0, 0), (0, 1, 0))
    values = measure(images, prompts, [RewardMetric("denscore", Compass())])
    assert values["denscore"][[0, 4]] == pytest.approx([0.8, 0.6])
    assert values["denscore.text_irrelevant"][[0, 4]] == pytest.approx([0.8, 0.0])
    assert values["denscore.text_relevant"][[0, 4]] == pytest.approx([0.0, 0.6])
    # the component of "east" orthogonal to the direction is (0, 0.6, 0), normalized (0, 1, 0)
    assert values["denscore-o"][[0, 4]] == pytest.approx([0.0, 1.0])


def test_reward_metric_watches_text_irrelevant_part_only():
    metric = RewardMetric("denscore", Compass())
    names = ("denscore", "denscore.text_relevant", "denscore.text_irrelevant", "denscore-o")
    assert [metric.value(name).direction for name in names] == ["higher", "higher", None, "higher"]


def test_reward_metric_has_no_parts_of_a_single_prompt():
    values = measure(colours((1, 0, 0), (0, 1, 0)), ["east", "east"], [RewardMetric("denscore", Compass())])
    assert values["denscore"] == pytest.approx([0.8, 0.6])
    assert all(np.isnan(values[f"denscore{part}"]).all() for part in (".text_relevant", ".text_irrelevant", "-o"))


def test_reward_metric_names_of_several_rewards():
    built = [RewardMetric("a", Compass()), RewardMetric("bright", Brightness()), RewardMetric("b", Compass())]
    table = evaluate({"base": colours((1, 0, 0), (0, 1, 0))}, ["east", "west"], built)
    a, b = ([name, f"{name}.text_relevant", f"{name}.text_irrelevant", f"{name}-o"] for name in "ab")
    assert table.metrics == [*a, "bright", "bright.red", *b]
    np.testing.assert_allclose(table.row("base", a[1]) + table.row("base", a[2]), table.row("base", "a"), atol=1e-6)


def test_reward_metric_segments(tmp_path):
    inner = {"name": "clip", "checkpoint": str(tiny_clip(tmp_path)), "text": "segments"}
    reward = rewards.build(inner, Runtime()).eval()
    prompts, images = ["A fox. It sleeps.", "A wall."], torch.rand(2, 3, 32, 32)
    values = measure(images, prompts, [metrics.build({"name": "reward", "reward": inner, "segments": True}, Runtime())])
    lowest = [min(score for _, score in row) for row in reward.by_segment(images, prompts)]
    np.testing.assert_allclose(values["clip.segment_min"], lowest, rtol=1e-5)
    np.testing.assert_allclose(values["clip.segment_mean"], values["clip"], rtol=1e-4)
    with pytest.raises(ValueError, match=r"'bright' .*segments"):
        RewardMetric("bright", Brightness(), segments=True)


def test_check_metric_reward(tmp_path):
    inner = {"name": "clip", "checkpoint": str(tiny_clip(tmp_path))}
    check_metric({"name": "reward", "reward": inner, "label": "score", "segments": True})
    check_metric({"name": "reward", "reward": {"name": "sum", "terms": [{"reward": inner, "weight": 0.5}]}})
