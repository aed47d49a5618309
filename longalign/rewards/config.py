"""The base class of reward configs; no torch here."""

from __future__ import annotations

from typing import ClassVar

from longalign.registry import PartConfig


class RewardConfig(PartConfig):
    """Base of configs of rewards.

    Both class variables are checked before anything is loaded. ``embeds``: whether the reward is a
    `longalign.rewards.base.EmbeddingReward`; only those can be reweighted. ``differentiable``: whether its scores have
    gradient with respect to the images.
    """

    embeds: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    #: whether the trainer `denscore` can train the reward: a `TowerReward` whose towers implement all hooks of `Towers`
    trainable_towers: ClassVar[bool] = False

    def is_differentiable(self) -> bool:
        """Whether the scores have gradient with respect to the images; a composite asks its inner rewards."""
        return self.differentiable
