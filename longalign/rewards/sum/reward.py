"""Weighted sums of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longalign import registry
from longalign.names import unique_name
from longalign.rewards.base import Reward, Scores, as_reward, check_pairs, guarded
from longalign.rewards.sum.config import SumConfig
from longalign.runtime import Runtime


class SumReward(Reward):
    """Weighted sum of rewards, ``sum_i weight_i * reward_i``.

    `Scores.parts` contain the unweighted total of each term as ``<label>`` and its parts as ``<label>/<part>``.

    Args:
        rewards: label and reward of each term.
        weights: weight of each term, in the same order.
    """

    def __init__(self, rewards: dict[str, Reward], weights: Sequence[float]):
        super().__init__()
        if not rewards or len(rewards) != len(weights):
            raise ValueError(
                f"expected at least one reward and one weight for each, got {len(rewards)} rewards and {len(weights)} "
                "weights"
            )
        self.labels, self.weights = tuple(rewards), tuple(weights)
        self.rewards = nn.ModuleList(rewards.values())

    @classmethod
    def from_config(cls, config: SumConfig, runtime: Runtime) -> SumReward:
        """Builds the reward; the terms of the sum may be rewards or functions registered as rewards."""
        labels = {term.label for term in config.terms if term.label}
        rewards: dict[str, Reward] = {}
        for term in config.terms:
            label = term.label or unique_name(term.reward.name, labels)
            labels.add(label)
            rewards[label] = as_reward(registry.rewards.build(term.reward, runtime), label)
        return cls(rewards, [term.weight for term in config.terms])

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total, parts = images.new_zeros(len(images), dtype=torch.float32), {}
        for label, weight, reward in zip(self.labels, self.weights, self.rewards, strict=True):
            assert isinstance(reward, Reward)
            term = guarded(reward, images, prompts)
            total = total + weight * term.total.to(total.device)  # a function may score on the device of the images
            parts[label] = term.total.detach()
            parts.update({f"{label}/{name}": value.detach() for name, value in term.parts.items()})
        return Scores(total, parts).checked(images, prompts)
