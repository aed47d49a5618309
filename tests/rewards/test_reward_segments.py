import pytest
import torch

from longalign.registry import ConfigError, rewards, segmenters
from longalign.rewards.base import CallableReward
from longalign.rewards.segments.reward import SegmentsReward
from longalign.runtime import Runtime
from longalign.testing import check_reward

TWO = "A red fox sleeps. The sky is green."


def wrapped(inner, reduce="mean", segmenter="sentence"):
    return SegmentsReward(inner, segmenters.build(segmenter), reduce=reduce)


@pytest.fixture
def letters():
    """Brightness times the number of letters of the text."""
    return CallableReward(lambda images, texts: images.mean((1, 2, 3)) * torch.tensor([float(len(t)) for t in texts]))


@pytest.mark.parametrize(("reduce", "expected"), [("mean", [2.5, 1.0]), ("min", [2.0, 1.0])])
def test_segments_mean_and_minimum(letters, reduce, expected):
    images = torch.stack([torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), 0.25)])
    scores = wrapped(letters, reduce).score_components(images, ["One. Three.", "Two."])
    assert torch.allclose(scores.total, torch.tensor(expected))
    assert list(scores.parts) == ["mean", "min"] and torch.equal(scores.parts[reduce], scores.total)


def test_segments_gradient_of_minimum_is_that_of_worst_segment(letters):
    images = torch.rand(1, 3, 2, 2, requires_grad=True)
    wrapped(letters, "min").score(images, ["One. Three."]).sum().backward()
    assert torch.allclose(images.grad, torch.full((1, 3, 2, 2), 4 / 12))


def test_segments_of_embedding_reward_encode_each_image_once(clip_folder, monkeypatch):
    inner = {"name": "clip", "checkpoint": clip_folder}
    reward = rewards.build({"name": "segments", "inner": inner, "reduce": "min"})
    encoded, features = [], reward.inner.image_features
    monkeypatch.setattr(reward.inner, "image_features", lambda images: encoded.append(len(images)) or features(images))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    scores = reward.score_components(images, [TWO, "A wall."])
    assert encoded == [2]
    sentences = reward.inner.score(images[[0, 0, 1]], ["A red fox sleeps.", "The sky is green.", "A wall."])
    assert torch.allclose(scores.total, torch.stack([sentences[:2].min(), sentences[2]]), atol=1e-6)
    by_text = rewards.build({**inner, "text": "segments"}).score(images, [TWO, "A wall."])
    assert torch.allclose(scores.parts["mean"], by_text, atol=1e-6)
    (gradient,) = torch.autograd.grad(scores.total.sum(), images)
    (expected,) = torch.autograd.grad(sentences[:2].min() + sentences[2], images)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_segments_never_exceed_the_window(clip_folder):
    reward = rewards.build({"name": "segments", "inner": {"name": "clip", "checkpoint": clip_folder}, "reduce": "min"})
    segments = reward.segments("fox " * 400)
    assert " ".join(segments).split() == ["fox"] * 400
    assert all(reward.inner.count_tokens(segment) <= reward.inner.window for segment in segments)


def test_segments_in_sum_and_reweighted_inside_segments(clip_folder):
    inner = {"name": "reweighted", "inner": {"name": "clip", "checkpoint": clip_folder}, "omega": 1.0}
    segments = {"name": "segments", "inner": inner, "reduce": "min"}
    reward = rewards.build({"name": "sum", "terms": [{"reward": segments, "weight": 2.0}]})
    plain = rewards.build({"name": "segments", "inner": inner["inner"], "reduce": "min"})
    images = torch.rand(2, 3, 32, 32)
    scores = reward.score_components(images, [TWO, "A wall."])
    assert torch.allclose(scores.total, 2 * plain.score(images, [TWO, "A wall."]), atol=1e-5)
    assert list(scores.parts) == ["segments", "segments/mean", "segments/min"]


def test_segments_reject_the_mean_of_a_tower_reward_and_unknown_token_counts(letters):
    with pytest.raises(ConfigError, match=r"'clip' computes the mean.*`text: segments`.*`reduce: min`"):
        rewards.validate({"name": "segments", "inner": "clip"})
    with pytest.raises(ValueError, match="cannot count tokens; use a segmenter without"):
        wrapped(letters, segmenter={"name": "tokens", "n": 5}).score(torch.rand(1, 3, 2, 2), [TWO])


def test_segments_conform(clip_folder):
    inner = {"name": "clip", "checkpoint": clip_folder}
    check_reward({"name": "segments", "inner": inner, "reduce": "min"}, runtime=Runtime())
