import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from longalign.rewards.base import CallableReward, Reward, Scores, as_reward, guarded
from longalign.rewards.guard import NonFiniteReward


def non_finite_error(bad: float) -> NonFiniteReward:
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0] = 1.0
    images.requires_grad_()
    reward = CallableReward(lambda images, prompts: images.sum((1, 2, 3)) + torch.tensor([0.0, bad, 0.0]))
    with pytest.raises(NonFiniteReward) as error:
        reward.score(images, ["one", "two", "three"])
    return error.value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_reward_keeps_image_and_prompt(bad):
    error = non_finite_error(bad)
    assert (error.index, error.prompt) == (1, "two")
    assert torch.equal(error.image[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert not error.image.requires_grad
    assert "1 of 3 scores of the reward 'non_finite_error.<locals>.<lambda>'" in str(error)
    assert "'two'" in str(error)
    assert "pixels are finite" in str(error)


def test_non_finite_reward_save_writes_files_and_names_folder(tmp_path):
    error = non_finite_error(math.nan)
    error.image[2, 1, 1] = math.nan
    folder = error.save(tmp_path / "new" / "step-7")
    assert str(folder) in str(error)
    png = np.asarray(Image.open(folder / "image.png"))
    assert png.shape == (2, 2, 3)
    assert png[0, 0].tolist() == [255, 0, 0]
    assert (folder / "prompt.txt").read_text() == "two"
    tensors = load_file(folder / "tensors.safetensors")
    assert tensors["image"][2, 1, 1].isnan()
    assert tensors["scores"].isfinite().tolist() == [True, False, True]


def test_score_checks_rewards_without_check():
    class UncheckedReward(Reward):
        def score_components(self, images, prompts):
            return Scores(images.new_full((len(images),), math.nan))

    with pytest.raises(NonFiniteReward):
        UncheckedReward().score(torch.zeros(1, 3, 2, 2), ["one"])


def test_score_keeps_gradient_of_finite_scores():
    images = torch.zeros(2, 3, 2, 2, requires_grad=True)
    as_reward(lambda images, prompts: images.mean((1, 2, 3))).score(images, ["a", "b"]).sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, torch.full_like(images, 1 / 12))


def test_function_reward_must_return_one_score_per_image():
    images = torch.zeros(2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"2 images, got shape \(\)"):
        as_reward(lambda images, prompts: images.sum()).score(images, ["a", "b"])
    with pytest.raises(ValueError, match=r"tensor.* list"):
        as_reward(lambda images, prompts: [1.0, 2.0]).score(images, ["a", "b"])
    with pytest.raises(ValueError, match=r"Reward.*got 'clip'"):
        as_reward("clip")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean((1, 2, 3)).detach(), "'faulty'.*gradient.*without detach"),
        (
            lambda images, prompts: torch.ones(2, dtype=torch.long),
            r"'faulty'.*floating-point.* torch\.int64",
        ),
        (lambda images, prompts: images.sum(), r"'faulty'.*2 images, got shape \(\)"),
        (lambda images, prompts: images.mul_(2).mean((1, 2, 3)), r"'faulty'.*images\.clone\(\)"),
        (lambda images, prompts: images[0].fill_(1).mean() + images.mean((1, 2, 3)), r"'faulty'.*images\.clone\(\)"),
        (lambda images, prompts: (images.sum((1, 2, 3)), 1), "'faulty'.*tensor.* tuple"),
    ],
)
def test_guarded_names_reward_and_problem(function, message):
    images = torch.zeros(2, 3, 2, 2, requires_grad=True) + 0.5
    with pytest.raises(ValueError, match=message):
        guarded(as_reward(function, "faulty"), images, ["a", "b"])


def test_guarded_allows_no_gradient_for_images_without_grad():
    images = torch.zeros(2, 3, 2, 2)
    assert guarded(
        as_reward(lambda images, prompts: images.mean((1, 2, 3)).detach()), images, ["a", "b"]
    ).total.shape == (2,)
    with torch.inference_mode():
        as_reward(lambda images, prompts: images.mean((1, 2, 3))).score(torch.zeros(1, 3, 2, 2), ["a"])


def test_as_reward_returns_rewards_unchanged():
    reward = CallableReward(lambda images, prompts: images.sum((1, 2, 3)))
    assert as_reward(reward) is reward
