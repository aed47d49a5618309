"""The rewards that a trainer maximizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longalign.edits.base import Edit
from longalign.rewards.base import Reward, Scores, as_reward, guarded


class RewardList(nn.ModuleList):
    """One or more frozen rewards, whose scores are added with equal weight.

    `train` sets training mode on `Reward` modules, e.g. for random crops, and on `Edit` modules, which change a
    reward's text embedding. The networks inside them stay in eval mode.

    Args:
        rewards: rewards, or functions ``(images (b, 3, h, w), b prompts) -> scores (b,)``.

    Raises:
        ValueError: if there are no rewards.
    """

    def __init__(self, rewards: Sequence[Any]):
        if not rewards:
            raise ValueError("reward fine-tuning expects at least one reward, got none; set rewards")
        super().__init__([as_reward(reward).requires_grad_(False) for reward in rewards])

    def train(self, mode: bool = True) -> RewardList:
        super().train(mode)
        for module in self.modules():
            module.training = mode and isinstance(module, (Reward, Edit))
        return self

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Returns the summed scores of all rewards as ``total`` ``(b,)``, and their named components as ``parts``.

        With several rewards, ``<i>/reward`` is the score of reward i, and names of its components start with ``<i>/``.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            prompts: one for each image.

        Raises:
            NonFiniteReward: if a score is not finite.
            ValueError: if a reward does not return one floating-point score per image, modifies the images, or returns
                scores without gradient for images with gradient.
        """
        scored = [guarded(reward, images, prompts) for reward in self if isinstance(reward, Reward)]
        if len(scored) == 1:
            return scored[0]
        parts = {}
        for i, scores in enumerate(scored):
            parts |= {f"{i}/{key}": value for key, value in {"reward": scores.total.detach(), **scores.parts}.items()}
        return Scores(torch.stack([scores.total for scores in scored]).sum(0), parts)
