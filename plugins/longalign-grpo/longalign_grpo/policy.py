"""Tensor functions of the policy gradient: advantages, log-probabilities of steps, clipped objective, KL divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def group_advantages(scores: Tensor, group_size: int, limit: float) -> Tensor:
    """Returns advantages ``(n,)``: scores minus the mean of their group, divided by the group's standard deviation.

    This is eq. 4 of Flow-GRPO (arXiv 2505.05470), with clipping. A group of equal scores has advantages 0.

    Args:
        scores: ``(n,)`` scores of images; ``group_size`` successive images are a group and have one prompt.
        group_size: number of images per prompt; divides n.
        limit: maximum absolute advantage.
    """
    groups = scores.detach().float().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).clamp(-limit, limit).flatten()


def step_log_prob(after: Tensor, mean: Tensor, std: float) -> Tensor:
    """Returns the log-density ``(b,)`` of latents under a normal distribution, averaged over the elements of a latent.

    With the average instead of the sum, probability ratios do not depend on the resolution.

    Args:
        after: ``(b, ...)`` latents after a sampling step.
        mean: ``(b, ...)`` mean of the distribution.
        std: standard deviation of each element.
    """
    log_prob = -((after - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Returns PPO's clipped objective ``(b,)`` (arXiv 1707.06347, eq. 7), which is to be maximized.

    Args:
        ratio: ``(b,)`` probability of a sampling step under the current model, divided by that under the model that
            sampled it.
        advantages: ``(b,)`` advantages of the images; see `group_advantages`.
        clip_range: a ratio below ``1 - clip_range`` or above ``1 + clip_range`` improves the objective no further.
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def step_kl(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """Returns the KL divergence ``(b,)`` of normal distributions with equal ``std``, averaged over the elements.

    Args:
        mean: ``(b, ...)`` mean of the first distribution.
        reference: ``(b, ...)`` mean of the second distribution.
        std: standard deviation of each element of both distributions.
    """
    return ((mean - reference) ** 2 / (2 * std**2)).flatten(1).mean(1)
