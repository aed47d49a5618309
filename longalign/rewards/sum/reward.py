"""Weighted sums of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longalign import registry
from longalign.names import unique_name
from longalign.rewards.base import Reward, Scores, as_reward, check_pairs, guarded
from longalign.rewards.sum.config import SumConfig
from longalign.runtime import Runtime

#: standard deviation of a term, divided by 1 + |mean|, up to which its scores count as equal
EPSILON = 1e-6


class SumReward(Reward):
    """Weighted sum of rewards, ``sum_i weight_i * reward_i``.

    With ``normalize="running"``, each term is ``weight_i * (reward_i - mean_i) / std_i``, with mean and standard
    deviation of the scores of the term so far, including the batch. Both statistics are detached, so the gradient is
    only divided by ``std_i``. They are updated in training mode only and are part of the ``state_dict``. While all
    scores of a term are equal, ``std_i`` is replaced by 1. Scoring in eval mode before any update raises ValueError.

    `Scores.parts` contain the scores of each term as ``<label>``, before normalization and weighting, and the parts of
    its reward as ``<label>/<part>``.

    Args:
        rewards: label and reward of each term.
        weights: weight of each term, in the order of ``rewards``.
        normalize: ``"none"`` or ``"running"``.
        gather: `Runtime.gather`, by which the statistics are computed from the scores of all processes.
    """

    means: Tensor
    squares: Tensor
    count: Tensor

    def __init__(
        self, rewards: dict[str, Reward], weights: Sequence[float], *, normalize: str, gather: Callable[[Any], Any]
    ):
        super().__init__()
        if not rewards or len(rewards) != len(weights):
            raise ValueError(
                f"expected at least one reward and one weight for each, got {len(rewards)} rewards and {len(weights)} "
                "weights; pass equal numbers"
            )
        self.labels, self.weights = tuple(rewards), tuple(weights)
        self.rewards = nn.ModuleList(rewards.values())
        self.normalize, self.gather = normalize == "running", gather
        if self.normalize:
            self.register_buffer("means", torch.zeros(len(rewards)))
            self.register_buffer("squares", torch.zeros(len(rewards)))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_config(cls, config: SumConfig, runtime: Runtime) -> SumReward:
        """Builds the rewards of the terms, which may be functions registered as rewards, and their sum."""
        labels = {term.label for term in config.terms if term.label}
        rewards: dict[str, Reward] = {}
        for term in config.terms:
            label = term.label or unique_name(term.reward.name, labels)
            labels.add(label)
            rewards[label] = as_reward(registry.rewards.build(term.reward, runtime), label)
        weights = [term.weight for term in config.terms]
        return cls(rewards, weights, normalize=config.normalize, gather=runtime.gather).to(runtime.device)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        terms, parts = [], {}
        for label, reward in zip(self.labels, self.rewards, strict=True):
            assert isinstance(reward, Reward)
            term = guarded(reward, images, prompts)
            terms.append(term.total.float().to(images.device))  # a function may score on a different device
            parts[label] = term.total.detach()
            parts.update({f"{label}/{name}": value.detach() for name, value in term.parts.items()})
        scores = torch.stack(terms, 1)
        if self.normalize:
            scores = self._normalized(scores)
        total = (scores * scores.new_tensor(self.weights)).sum(1)
        return Scores(total, parts).checked(images, prompts)

    def _normalized(self, scores: Tensor) -> Tensor:
        """Returns the z-scores of the scores ``(b, k)`` of k terms; in training mode first updates the statistics.

        Raises:
            ValueError: in eval mode before the first update.
        """
        if self.training:
            self._update(self.gather(scores.detach()).to(self.means))
        elif not self.count:
            raise ValueError(
                "the reward 'sum' has no statistics yet for `normalize: running`; score in training mode first, or "
                "evaluate with `normalize: none`"
            )
        std = (self.squares / self.count).sqrt()
        std = torch.where(std > EPSILON * (1 + self.means.abs()), std, 1.0)
        return (scores - self.means.to(scores)) / std.to(scores)

    def _update(self, scores: Tensor) -> None:
        """Adds n scores of k terms, ``(n, k)``, to the running means and sums of squared deviations.

        Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
        (1979), equation 2.1.
        """
        count = self.count + len(scores)
        mean = scores.mean(0)
        shift = mean - self.means
        self.squares += (scores - mean).square().sum(0) + shift.square() * self.count * len(scores) / count
        self.means += shift * len(scores) / count
        self.count.copy_(count)
