"""The conformance check of a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longalign.registry import rewards
from longalign.rewards.base import EmbeddingReward, Reward, as_reward
from longalign.rewards.config import RewardConfig
from longalign.runtime import Runtime
from longalign.testing.common import (
    CPU,
    EMOJI,
    LONG,
    SHORT,
    checked_config,
    config_checks,
    expect,
    expect_close,
    expect_error,
    run_checks,
)


def check_reward(config: Any, *, runtime: Runtime = CPU, size: int = 64, depends_on_batch: bool = False) -> None:
    """Checks that a reward can be used by every trainer and metric.

    It checks the config (see `longalign.testing.common.config_checks`). Scores must have shape ``(b,)``,
    be the same in a repeated call, and depend on the image but not on the batch. The prompts include the empty one, one
    of more than 1000 words and one with emoji. Invalid input must raise ValueError, and no parameter may require
    gradient. The images of a differentiable reward must get a finite non-zero gradient. A key ``micro_batch`` must not
    change the scores. If the config's ``embeds`` is True, the reward `reweighted` with omega 1 must give the same
    scores.

    Args:
        config: name, mapping or config of the reward.
        runtime: device and dtype.
        size: side of the square test images in pixels.
        depends_on_batch: whether a score depends on the other prompts of its batch. If True, scores of a batch are not
            compared with those of single images.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("rewards", config, RewardConfig)
    reward = as_reward(rewards.construct(checked, runtime), checked.name).eval()
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(runtime.device)
    prompts = [SHORT, LONG, EMOJI, ""]

    def score(images: Tensor, prompts: list[str], reward: Reward = reward) -> Tensor:
        with torch.no_grad():
            return reward.score(images, prompts)

    def scores_have_one_value_per_image() -> None:
        scores = score(images, prompts)
        expect(scores.shape == (4,), f"expected scores of shape (4,), got {tuple(scores.shape)}")
        expect(scores.is_floating_point(), f"expected floating-point scores, got {scores.dtype}")

    def scores_repeat() -> None:
        expect_close("the same call twice", score(images, prompts), score(images, prompts), 0, 0)

    def a_batch_equals_singles() -> None:
        singles = torch.cat([score(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
        expect_close("a batch and its images one by one", score(images, prompts), singles)

    def scores_depend_on_the_image() -> None:
        scores = score(images, [SHORT] * 4)
        expect(float(scores.std()) > 0, "four different images have the same score")

    def invalid_input_is_an_error() -> None:
        expect_error("two prompts for four images", lambda: score(images, prompts[:2]))
        expect_error("a bare string as prompts", lambda: score(images, SHORT))  # type: ignore[arg-type]
        if isinstance(reward, EmbeddingReward):
            expect_error("images in [0, 255]", lambda: score(255 * images, prompts))
        expect_error("NaN in an image", lambda: score(torch.full_like(images, torch.nan), prompts))

    def gradient(reward: Reward) -> Tensor:
        leaf = images.clone().requires_grad_()
        reward.score(leaf, prompts).sum().backward()
        expect(leaf.grad is not None, "the images got no gradient; compute scores without detach")
        assert leaf.grad is not None
        return leaf.grad

    def gradient_is_finite_and_non_zero() -> None:
        grads = gradient(reward)
        expect(bool(grads.isfinite().all()), "the gradient in the images is not finite")
        zero = [i for i in range(4) if not grads[i].any()]
        expect(not zero, f"images {zero} have a zero gradient")

    def parameters_are_frozen() -> None:
        trainable = [name for name, p in reward.named_parameters() if p.requires_grad]
        expect(not trainable, f"the parameters {trainable[:3]} require grad")

    def micro_batches_change_nothing() -> None:
        small = rewards.build({**checked.model_dump(), "micro_batch": 1}, runtime).eval()
        expect_close("scores with micro_batch 1", score(images, prompts, small), score(images, prompts))
        if checked.is_differentiable():
            expect_close("the gradient with micro_batch 1", gradient(small), gradient(reward), atol=1e-6)

    def reweighting_works() -> None:
        expect(
            isinstance(reward, EmbeddingReward), f"embeds is True, but {type(reward).__name__} is no EmbeddingReward"
        )
        whole = rewards.build({"name": "reweighted", "inner": checked.model_dump(), "omega": 1.0}, runtime).eval()
        expect_close("reweighted with omega 1", score(images, prompts, whole), score(images, prompts))

    checks = [
        *config_checks("rewards", checked),
        scores_have_one_value_per_image,
        scores_repeat,
        invalid_input_is_an_error,
        parameters_are_frozen,
    ]
    if not depends_on_batch:
        checks += [a_batch_equals_singles, scores_depend_on_the_image]
    if checked.is_differentiable():
        checks.append(gradient_is_finite_and_non_zero)
    if "micro_batch" in type(checked).model_fields:
        checks.append(micro_batches_change_nothing)
    if checked.embeds:
        checks.append(reweighting_works)
    run_checks("rewards", config, checks)
