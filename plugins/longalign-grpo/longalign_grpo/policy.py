"""Tensor functions of the policy gradient: advantages, log-probabilities of steps, clipped objective, KL divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def group_advantages(scores: Tensor, group_size: int, limit: float) -> Tensor:
    """Returns the advantages ``(n,)``: scores minus the mean of their group, in standard deviations of the group.

    Flow-GRPO, arXiv 2505.05470, eq. 4. A group of equal scores has advantages 0.

    Args:
        scores: ``(n,)`` scores; each ``group_size`` of them have one prompt.
        group_size: images per prompt.
        limit: limit of the absolute advantage.
    """
    groups = scores.detach().float().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).clamp(-limit, limit).flatten()


def step_log_prob(after: Tensor, mean: Tensor, std: float) -> Tensor:
    """Returns the log-density ``(b,)`` of latents ``(b, ...)`` under a normal distribution, as mean over the elements.

    The mean, instead of the sum, makes the range of the ratio independent of the resolution.
    """
    log_prob = -((after - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Returns PPO's objective ``(b,)`` (arXiv 1707.06347, eq. 7), which is maximized.

    Args:
        ratio: ``(b,)`` probability of the step under the model, divided by that under the model that sampled it.
        advantages: ``(b,)``.
        clip_range: a ratio beyond ``1 - clip_range`` and ``1 + clip_range`` gains nothing.
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def step_kl(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """Returns the KL divergence ``(b,)`` of two normal distributions of equal ``std``, a mean over the elements."""
    return ((mean - reference) ** 2 / (2 * std**2)).flatten(1).mean(1)
