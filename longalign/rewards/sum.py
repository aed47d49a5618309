"""Weighted sums of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longalign import registry
from longalign.rewards.base import Reward, Scores, as_reward, check_pairs
from longalign.rewards.guard import guarded
from longalign.runtime import Runtime

if TYPE_CHECKING:
    from longalign.rewards.configs import SumConfig


class SumReward(Reward):
    """``sum_i weight_i reward_i``.

    `Scores.parts` hold each term's unweighted total as ``<label>`` and its parts as ``<label>/<part>``.

    Args:
        rewards: the terms by label.
        weights: one for each term, in the same order.
    """

    def __init__(self, rewards: dict[str, Reward], weights: Sequence[float]):
        super().__init__()
        if not rewards or len(rewards) != len(weights):
            raise ValueError(
                f"expected one weight for each of at least one reward, got {len(rewards)} and {len(weights)}"
            )
        self.labels, self.weights = tuple(rewards), tuple(weights)
        self.rewards = nn.ModuleList(rewards.values())

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total, parts = images.new_zeros(len(images), dtype=torch.float32), {}
        for label, weight, reward in zip(self.labels, self.weights, self.rewards, strict=True):
            assert isinstance(reward, Reward)
            term = guarded(reward, images, prompts)
            total = total + weight * term.total.to(total.device)  # a plain function may score where the images are
            parts[label] = term.total.detach()
            parts.update({f"{label}/{name}": value.detach() for name, value in term.parts.items()})
        return Scores(total, parts).checked(images, prompts)


def load_sum(config: SumConfig, runtime: Runtime) -> SumReward:
    """Builds all terms; plain functions registered as rewards are terms like any other."""
    taken = {term.label for term in config.terms if term.label}
    rewards: dict[str, Reward] = {}
    for term in config.terms:
        label = term.label or _free(term.reward.name, taken)
        taken.add(label)
        rewards[label] = as_reward(registry.rewards.build(term.reward, runtime), label)
    return SumReward(rewards, [term.weight for term in config.terms])


def _free(name: str, taken: set[str]) -> str:
    label, number = name, 2
    while label in taken:
        label, number = f"{name}-{number}", number + 1
    return label
