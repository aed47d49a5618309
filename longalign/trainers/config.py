"""The base class of trainer configs; no torch here."""

from __future__ import annotations

from typing import Any, ClassVar

from longalign.registry import PartConfig
from longalign.runtime import Runtime


class TrainerConfig(PartConfig):
    """Base class of trainer configs. A trainer is built from parts that are already built, not from their configs.

    Class variables state what a trainer requires of a run. They are checked before anything is loaded.

    - ``needs``: which of ``backbone`` and ``encoder`` are required; the others must be omitted.
    - ``uses_rewards``: whether the run may have rewards.
    - ``trains_rewards``: whether the rewards are what is trained.
    - ``compares_pairs``: whether the data must have two images of each prompt.
    - ``needs_images``: whether the data must have images.
    """

    needs: ClassVar[tuple[str, ...]] = ("backbone", "encoder")
    uses_rewards: ClassVar[bool] = False
    trains_rewards: ClassVar[bool] = False
    compares_pairs: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True

    @property
    def image_size(self) -> int | None:
        """Side of the sampled images in pixels; None if it samples none, or in the backbone's native resolution."""
        return None

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        """Builds the trainer and sets the trainable parameters of its parts.

        Args:
            runtime: device, dtype and processes of the parts.
            backbone: a `longalign.backbones.base.Backbone`.
            encoder: a `longalign.encoders.base.Encoder`.
            rewards: rewards, or plain functions ``(images, prompts) -> scores``.
        """
        raise NotImplementedError

    def _reject_rewards(self, rewards: Any) -> None:
        if rewards:
            raise ValueError(f"'{self.name}' uses no rewards, got {len(rewards)}")
