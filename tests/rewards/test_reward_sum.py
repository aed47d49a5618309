import math
from functools import partial

import pytest
import torch

from longalign.registry import ConfigError, rewards
from longalign.rewards.base import CallableReward
from longalign.rewards.guard import NonFiniteReward
from longalign.rewards.sum.reward import SumReward as Sum
from longalign.testing.tiny import edited

SumReward = partial(Sum, normalize="none", gather=lambda tensor: tensor)


@pytest.fixture
def brightness():
    @rewards.register("test-brightness")
    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    yield brightness
    rewards.unregister("test-brightness")


def test_sum_values_and_prefixed_parts(known):
    images = torch.tensor([[0.0, 1.0, 0.0], [0.8, 0.0, 0.6]])[:, :, None, None].expand(-1, -1, 2, 2).contiguous()
    mean = CallableReward(lambda images, prompts: images.mean((1, 2, 3)))
    total = SumReward({"known": edited(known, omega=0.5), "mean": mean}, [2.0, -3.0])
    scores = total.score_components(images, ["up", "down"])
    assert torch.allclose(scores.total, torch.tensor([2 * 0.8 - 1.0, 2 * 0.24 - 1.4]))
    assert torch.allclose(scores.parts["known"], torch.tensor([0.8, 0.24]))
    assert torch.allclose(scores.parts["known/text_irrelevant"], torch.tensor([0.0, 0.48]))
    own = ["text_relevant", "text_irrelevant", "eta", "edit_norm"]
    assert list(scores.parts) == ["known", *(f"known/{name}" for name in own), "mean"]


def test_sum_of_named_and_registered_rewards(clip_folder, brightness):
    clip = {"name": "clip", "checkpoint": clip_folder}
    reward = rewards.build(
        {"name": "sum", "terms": [{"reward": clip, "weight": 0.5}, {"reward": "test-brightness", "weight": 2.0}]}
    )
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    plain = rewards.build(clip).score(images, ["fox", "sky"])
    scores = reward.score_components(images, ["fox", "sky"])
    assert torch.allclose(scores.total, 0.5 * plain + 2 * images.mean((1, 2, 3)), atol=1e-6)
    assert set(scores.parts) == {"clip", "test-brightness"}
    scores.total.sum().backward()
    assert images.grad is not None
    assert not any(part.requires_grad for part in scores.parts.values())
    assert all(p.grad is None for p in reward.parameters())


def test_sum_labels_name_parts_and_are_numbered(clip_folder, brightness):
    terms = [
        {"reward": "test-brightness"},
        {"reward": "test-brightness", "label": "mine"},
        {"reward": "test-brightness"},
    ]
    reward = rewards.build({"name": "sum", "terms": terms})
    assert list(reward.score_components(torch.rand(1, 3, 4, 4), ["a"]).parts) == [
        "test-brightness",
        "mine",
        "test-brightness-2",
    ]


def test_sum_state_dict_contains_running_direction(known):
    reward = SumReward({"known": edited(known, omega=0.5, direction="running")}, [1.0])
    reward.score(torch.rand(1, 3, 4, 4), ["up"])
    assert reward.state_dict()["rewards.0.common.running_count"].item() == 1


def test_sum_rejects_non_finite_term_of_weight_zero():
    images = torch.zeros(1, 3, 2, 2)
    bad = CallableReward(lambda images, prompts: images.mean((1, 2, 3)) + math.nan)
    with pytest.raises(NonFiniteReward):
        SumReward({"bad": bad}, [0.0]).score(images, ["a"])


def test_sum_rejects_wrong_terms():
    with pytest.raises(ConfigError, match=r"terms: .*at least one term"):
        rewards.validate({"name": "sum", "terms": []})
    wrong = [{"reward": {"name": "clip", "chekpoint": "x"}}, {"reward": "clip", "weigth": 2}]
    with pytest.raises(ConfigError, match=r"terms\.0\.reward\.chekpoint: .*(.|\n)*terms\.1\.weigth"):
        rewards.validate({"name": "sum", "terms": wrong})
    with pytest.raises(ConfigError, match=r"labels .*'a'"):
        rewards.validate({"name": "sum", "terms": [{"reward": "clip", "label": "a"}] * 2})
    with pytest.raises(ValueError, match="got 0 rewards and 0 weights"):
        SumReward({}, [])


def test_sum_config_round_trip():
    terms = [{"reward": {"name": "reweighted", "inner": "denscore"}, "weight": 0.5}, {"reward": "pickscore"}]
    config = rewards.validate({"name": "sum", "terms": terms})
    assert rewards.validate(config.model_dump(mode="json")) == config


def running(*scales, weights=None, gather=lambda tensor: tensor):
    terms = {
        f"{i}": CallableReward(lambda images, prompts, s=s: s * images.mean((1, 2, 3))) for i, s in enumerate(scales)
    }
    return Sum(terms, weights or [1.0] * len(scales), normalize="running", gather=gather)


def grey(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2).clone().requires_grad_()


def test_sum_running_z_scores_of_all_scores_so_far():
    total = running(1.0, 100.0, weights=[1.0, 2.0]).train()
    first = total.score_components(grey(0.0, 1.0), ["a", "b"])
    assert torch.allclose(first.total, torch.tensor([-3.0, 3.0]), atol=1e-4)  # mean 0.5, std 0.5 of each term
    assert torch.allclose(first.parts["1"], torch.tensor([0.0, 100.0]), atol=1e-4)
    total.score(grey(1.0, 2.0), ["a", "b"])  # now 0, 1, 1, 2: mean 1, variance 0.5
    state = {key: value.clone() for key, value in total.state_dict().items()}
    expected = 3 * torch.tensor([-1.0, 2.0]) * 2**0.5
    assert torch.allclose(total.eval().score(grey(0.0, 3.0), ["a", "b"]), expected, atol=1e-3)
    assert all(torch.equal(value, total.state_dict()[key]) for key, value in state.items())
    other = running(1.0, 100.0, weights=[1.0, 2.0])
    other.load_state_dict(state)
    assert torch.allclose(other.eval().score(grey(0.0, 3.0), ["a", "b"]), expected, atol=1e-3)


def test_sum_running_gradient_is_divided_by_std_only():
    images = grey(0.0, 1.0)
    running(100.0).train().score(images, ["a", "b"]).sum().backward()
    # std 50; the score's derivative to each of the 12 values of an image is 100 / 12
    torch.testing.assert_close(images.grad, torch.full_like(images, 100 / 12 / 50))


def test_sum_running_equal_scores_are_only_centred():
    total = running(1.0).train()
    assert torch.allclose(total.score(grey(0.5), ["a"]), torch.zeros(1))
    assert torch.allclose(total.eval().score(grey(0.75), ["a"]), torch.tensor([0.25]))


def test_sum_running_statistics_of_all_processes():
    other = torch.tensor([[1.0], [3.0]])
    total = running(1.0, gather=lambda scores: torch.cat([scores, other])).train()
    # 0, 0, 1, 3: mean 1, variance 1.5
    assert torch.allclose(total.score(grey(0.0, 0.0), ["a", "b"]), torch.full((2,), -1 / 1.5**0.5))


def test_sum_running_without_statistics_raises_in_eval_mode():
    with pytest.raises(ValueError, match=r"running.*training mode"):
        running(1.0).eval().score(grey(0.0), ["a"])
