"""`SegmentCLIPScore` gives the reward's segment scores. Skipped without torchmetrics."""

import sys
from importlib import import_module

import pytest
import torch

from longalign.registry import rewards
from longalign.testing.tiny import tiny_clip

PROMPTS = [
    "A red circle is at the top. It is large.",
    "The ground is grey.",
    "A wall stands on the left, " * 40 + "and it is red. A fox sleeps on it.",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return {"name": "clip", "checkpoint": str(tiny_clip(tmp_path_factory.mktemp("clip"))), "text": "segments"}


@pytest.fixture
def metric_class():
    pytest.importorskip("torchmetrics")
    return import_module("longalign.evaluation.torchmetrics").SegmentCLIPScore


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 40)


def test_segment_clip_score_equals_the_reward_in_several_batches(metric_class, config, images):
    reward = rewards.build(config)
    assert reward.towers.count_tokens(PROMPTS[2]) > reward.towers.window
    metric = metric_class(config)
    metric.update(images[:2], PROMPTS[:2])
    metric.update(images[2:], PROMPTS[2])
    expected = reward.score(images, PROMPTS)
    torch.testing.assert_close(metric.compute(), expected.mean(), atol=1e-6, rtol=0)
    by_segment = [torch.tensor([score for _, score in pairs]).mean() for pairs in reward.by_segment(images, PROMPTS)]
    torch.testing.assert_close(metric.compute(), torch.stack(by_segment).mean(), atol=1e-6, rtol=0)


def test_segment_clip_score_reset_forgets_images(metric_class, config, images):
    metric = metric_class(rewards.build(config))
    metric.update(images, PROMPTS)
    metric.reset()
    metric.update(images[:1], PROMPTS[0])
    expected = metric.reward.score(images[:1], PROMPTS[:1])[0]
    torch.testing.assert_close(metric.compute(), expected, atol=1e-6, rtol=0)


def test_segment_clip_score_forward_returns_the_batch_value(metric_class, config, images):
    metric = metric_class(config)
    scores = metric.reward.score(images, PROMPTS)
    torch.testing.assert_close(metric(images[:1], PROMPTS[:1]), scores[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(metric(images[1:], PROMPTS[1:]), scores[1:].mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(metric.compute(), scores.mean(), atol=1e-6, rtol=0)


def test_segment_clip_score_takes_bytes_and_ignores_training_mode(metric_class, config, images):
    pixels = (images * 255).round().byte()
    metric = metric_class({**config, "crop": 0.5}).train()
    metric.update(pixels, PROMPTS)
    expected = rewards.build(config).eval().score(pixels.float() / 255, PROMPTS).mean()
    torch.testing.assert_close(metric.compute(), expected, atol=1e-6, rtol=0)


def test_segment_clip_score_rejects_wrong_rewards_and_inputs(metric_class, config, images):
    with pytest.raises(ValueError, match="text: segments"):
        metric_class({**config, "text": "whole"})
    metric = metric_class(config)
    with pytest.raises(ValueError, match=r"\b3\b.*\b2\b|\b2\b.*\b3\b"):
        metric.update(images, PROMPTS[:2])


def test_segment_clip_score_without_torchmetrics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "longalign.evaluation.torchmetrics", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"longalign\[torchmetrics\]"):
        import_module("longalign.evaluation.torchmetrics")
