import pytest
import torch

from longalign.registry import ConfigError, rewards
from longalign.rewards.base import CallableReward
from longalign.runtime import Runtime
from longalign.testing.tiny import edited

V = torch.tensor([1.0, 0.0, 0.0])


def colours(*rows) -> torch.Tensor:
    """Images of a uniform colour, one per row."""
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4).contiguous()


IMAGES = colours([0.0, 1.0, 0.0], [0.8, 0.0, 0.6])


def test_reweighted_values(known):
    scores = edited(known, omega=0.5).score_components(IMAGES, ["up", "down"])
    assert torch.allclose(scores.parts["text_relevant"], torch.tensor([0.8, 0.0]))
    assert torch.allclose(scores.parts["text_irrelevant"], torch.tensor([0.0, 0.48]))
    assert torch.allclose(scores.parts["eta"], torch.tensor([0.6, 0.6]))
    assert torch.allclose(scores.total, torch.tensor([0.8, 0.24]))


@pytest.mark.parametrize("direction", ["batch", "running", torch.tensor([0.0, 0.6, 0.8])])
def test_reweighted_omega_one_is_plain_score(known, direction):
    prompts = ["up", "in"]
    scores = edited(known, omega=1.0, direction=direction).score_components(IMAGES, prompts)
    assert torch.equal(scores.total, known.score(IMAGES, prompts))
    assert torch.allclose(scores.parts["text_relevant"] + scores.parts["text_irrelevant"], scores.total)


def test_reweighted_omega_zero_has_no_component_along_v(known):
    reward = edited(known, omega=0.0)
    assert torch.allclose(reward.score(colours([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]), ["up", "down"]), torch.zeros(2))
    scores = reward.score_components(IMAGES, ["up", "down"])
    assert torch.allclose(scores.total, scores.parts["text_relevant"])


def test_reweighted_gradient_only_through_total(known):
    images = IMAGES.clone().requires_grad_()
    scores = edited(known, omega=0.0, direction=V).score_components(images, ["up", "down"])
    assert not any(part.requires_grad for part in scores.parts.values())
    scores.total.sum().backward()
    assert images.grad is not None
    # the second image's score changes with its green channel, which is orthogonal to the direction
    assert (images.grad[1, 1] < 0).all()


def test_reweighted_batch_direction_rejects_single_prompt(known):
    with pytest.raises(ValueError, match=r"got 1 prompt .*`direction: running`"):
        edited(known, omega=0.3).score(IMAGES[:1], ["up"])
    with pytest.raises(ValueError, match=r"got 2 times the same prompt .*`direction: running`"):
        edited(known, omega=0.3).score(IMAGES, ["up", "up"])
    edited(known, direction="running").score(IMAGES[:1], ["up"])
    edited(known, direction=V).score(IMAGES[:1], ["up"])


@pytest.mark.parametrize("direction", ["batch", "running"])
def test_reweighted_two_processes_equal_joint_batch(known, direction):
    images, prompts = torch.rand(4, 3, 4, 4), ["up", "in", "along", "down"]
    joint = edited(known, omega=0.3, direction=direction).score_components(images, prompts)
    all_text = known.text_features(prompts)
    for rows in (slice(0, 2), slice(2, 4)):
        sent = []
        reward = edited(
            known, omega=0.3, direction=direction, gather=lambda text, sent=sent: sent.append(text) or all_text
        )
        scores = reward.score_components(images[rows], prompts[rows])
        assert torch.equal(sent[0], all_text[rows])
        assert torch.allclose(scores.total, joint.total[rows])
        for name, part in scores.parts.items():
            assert torch.allclose(part, joint.parts[name][rows])


def test_reweighted_accepts_batch_of_one_per_process(known):
    both = known.text_features(["up", "down"])
    scores = edited(known, gather=lambda text: both).score_components(IMAGES[:1], ["up"])
    assert torch.allclose(scores.parts["text_relevant"], torch.tensor([0.8]))


def test_running_direction_is_mean_over_batches(known):
    reward = edited(known, omega=0.0, direction="running")
    reward.score(IMAGES[:1], ["up"])
    scores = reward.score_components(IMAGES[:1], ["down"])
    assert torch.allclose(reward.common.running_mean, torch.tensor([0.6, 0.0, 0.0]))
    assert reward.common.running_count.item() == 2
    assert torch.allclose(scores.parts["eta"], torch.tensor([0.6]))


def test_running_direction_not_updated_in_eval_mode(known):
    reward = edited(known, omega=0.3, direction="running")
    with pytest.raises(ValueError, match=r"running direction .*no prompts"):
        reward.eval().score(IMAGES, ["up", "down"])
    reward.train().score(IMAGES, ["up", "down"])
    before = reward.common.running_mean.clone()
    reward.eval().score(IMAGES, ["in", "in"])
    assert torch.equal(reward.common.running_mean, before)
    assert reward.common.running_count.item() == 2


def test_running_direction_resumes_exactly(known):
    original = edited(known, omega=0.3, direction="running")
    original.score(IMAGES, ["up", "in"])
    resumed = edited(known, omega=0.3, direction="running")
    resumed.load_state_dict({key: value.clone() for key, value in original.state_dict().items()})
    for prompts in (["down", "along"], ["in", "up"]):
        assert torch.equal(original.score(IMAGES, prompts), resumed.score(IMAGES, prompts))
    assert set(original.state_dict()) == {"common.running_mean", "common.running_count"}
    assert not edited(known, omega=0.3, direction=V).state_dict()


def test_reweighted_wraps_any_embedding_reward(clip_folder, hpsv2_folder):
    images, prompts = torch.rand(2, 3, 40, 40, requires_grad=True), ["A red fox. A wall.", "The sky."]
    for inner in ({"name": "clip", "checkpoint": clip_folder}, {"name": "denscore", "checkpoint": clip_folder},
                  {"name": "hpsv2", "checkpoint": hpsv2_folder}):  # fmt: skip
        plain = rewards.build(inner).score(images, prompts)
        scores = rewards.build({"name": "reweighted", "omega": 1.0, "inner": inner}).score_components(images, prompts)
        assert torch.allclose(scores.total, plain, atol=1e-6)
        assert torch.allclose(scores.parts["text_relevant"] + scores.parts["text_irrelevant"], plain, atol=1e-6)
    reweighted = rewards.build({"name": "reweighted", "inner": {"name": "denscore", "checkpoint": clip_folder}})
    assert reweighted.edit.omega == 0.3
    reweighted.score(images, prompts).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).any()
    assert all(p.grad is None for p in reweighted.parameters())


def test_reweighted_denscore_direction_uses_segment_means(clip_folder):
    inner = {"name": "denscore", "checkpoint": clip_folder}
    reward = rewards.build({"name": "reweighted", "inner": inner})
    fox, sky = reward.inner.text_features(["A fox.", "The sky."])
    text = reward.inner.text_features(["A fox. The sky.", "The sky."])
    expected = ((fox + sky) / 2 + sky) / 2
    assert torch.allclose(reward.common(text, True), expected / expected.norm(), atol=1e-6)


def test_reweighted_gathers_through_runtime(clip_folder):
    calls = []
    runtime = Runtime(gather=lambda text: calls.append(text.shape) or text)
    config = {"name": "reweighted", "inner": {"name": "clip", "checkpoint": clip_folder}}
    rewards.build(config, runtime).score(torch.rand(2, 3, 32, 32), ["fox", "sky"])
    assert calls == [(2, 16)]


def test_reweighted_rejects_wrong_settings(known, clip_folder):
    with pytest.raises(ValueError, match="EmbeddingReward"):
        edited(CallableReward(lambda images, prompts: images.sum((1, 2, 3))))  # type: ignore[arg-type]
    inner = {"name": "sum", "terms": [{"reward": {"name": "clip", "checkpoint": clip_folder}}]}
    with pytest.raises(ValueError, match=r"'sum'.*embeddings"):
        rewards.build({"name": "reweighted", "inner": inner})
    with pytest.raises(ValueError, match=r"'batch', 'running' .*'moving'"):
        edited(known, direction="moving")
    with pytest.raises(ValueError, match=r"direction .*\(3,\).* got \(2,\)"):
        edited(known, direction=torch.ones(2))
    with pytest.raises(ConfigError, match=r"inner\.chekpoint: .*did you mean 'checkpoint'"):
        rewards.validate({"name": "reweighted", "inner": {"name": "clip", "chekpoint": "x"}})
    with pytest.raises(ConfigError, match="omega: "):
        rewards.validate({"name": "reweighted", "inner": "clip", "omega": -0.1})
