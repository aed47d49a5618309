import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from longalign.rewards.base import CallableReward, Reward, Scores, as_reward
from longalign.rewards.guard import NonFiniteReward, guarded


def caught(bad: float) -> NonFiniteReward:
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0] = 1.0
    images.requires_grad_()
    reward = CallableReward(lambda images, prompts: images.sum((1, 2, 3)) + torch.tensor([0.0, bad, 0.0]))
    with pytest.raises(NonFiniteReward) as error:
        reward.score(images, ["one", "two", "three"])
    return error.value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_image_and_prompt_are_kept(bad):
    error = caught(bad)
    assert (error.index, error.prompt) == (1, "two")
    assert torch.equal(error.image[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert not error.image.requires_grad
    assert "1 of 3 scores of the reward 'caught.<locals>.<lambda>'" in str(error)
    assert "'two'" in str(error)
    assert "pixels are finite" in str(error)


def test_saving_writes_what_was_seen_and_names_the_folder(tmp_path):
    error = caught(math.nan)
    error.image[2, 1, 1] = math.nan
    folder = error.save(tmp_path / "kept" / "step-7")
    assert str(folder) in str(error)
    png = np.asarray(Image.open(folder / "image.png"))
    assert png.shape == (2, 2, 3)
    assert png[0, 0].tolist() == [255, 0, 0]
    assert (folder / "prompt.txt").read_text() == "two"
    tensors = load_file(folder / "tensors.safetensors")
    assert tensors["image"][2, 1, 1].isnan()
    assert tensors["scores"].isfinite().tolist() == [True, False, True]


def test_a_reward_that_forgets_to_check_is_checked_by_score():
    class Forgetful(Reward):
        def score_components(self, images, prompts):
            return Scores(images.new_full((len(images),), math.nan))

    with pytest.raises(NonFiniteReward):
        Forgetful().score(torch.zeros(1, 3, 2, 2), ["one"])


def test_finite_scores_pass_with_their_gradient():
    images = torch.zeros(2, 3, 2, 2, requires_grad=True)
    as_reward(lambda images, prompts: images.mean((1, 2, 3))).score(images, ["a", "b"]).sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, torch.full_like(images, 1 / 12))


def test_functions_must_return_one_score_per_image():
    images = torch.zeros(2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"one score for each of 2 images, got shape \(\)"):
        as_reward(lambda images, prompts: images.sum()).score(images, ["a", "b"])
    with pytest.raises(ValueError, match=r"must return a tensor of scores, not list"):
        as_reward(lambda images, prompts: [1.0, 2.0]).score(images, ["a", "b"])
    with pytest.raises(ValueError, match="expected a Reward or a function"):
        as_reward("clip")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean((1, 2, 3)).detach(), "'faulty' has no gradient in its images"),
        (
            lambda images, prompts: torch.ones(2, dtype=torch.long),
            r"'faulty' must return floating-point .* torch\.int64",
        ),
        (lambda images, prompts: images.sum(), r"'faulty' must return one score for each of 2 images, got shape \(\)"),
        (lambda images, prompts: images.mul_(2).mean((1, 2, 3)), "'faulty' writes into its images"),
        (lambda images, prompts: images[0].fill_(1).mean() + images.mean((1, 2, 3)), "'faulty' writes into its images"),
        (lambda images, prompts: (images.sum((1, 2, 3)), 1), "'faulty' must return a tensor of scores, not tuple"),
    ],
)
def test_a_faulty_reward_is_named_with_its_fault(function, message):
    images = torch.zeros(2, 3, 2, 2, requires_grad=True) + 0.5
    with pytest.raises(ValueError, match=message):
        guarded(as_reward(function, "faulty"), images, ["a", "b"])


def test_a_reward_without_gradient_scores_where_none_is_asked_for():
    images = torch.zeros(2, 3, 2, 2)
    assert guarded(
        as_reward(lambda images, prompts: images.mean((1, 2, 3)).detach()), images, ["a", "b"]
    ).total.shape == (2,)
    with torch.inference_mode():
        as_reward(lambda images, prompts: images.mean((1, 2, 3))).score(torch.zeros(1, 3, 2, 2), ["a"])


def test_rewards_are_left_as_they_are():
    reward = CallableReward(lambda images, prompts: images.sum((1, 2, 3)))
    assert as_reward(reward) is reward
