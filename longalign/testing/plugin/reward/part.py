"""The reward `my-part`."""

from __future__ import annotations

from collections.abc import Sequence

from my_plugin.config import MyPartConfig
from torch import Tensor

from longalign.rewards import Reward, Scores, check_pairs
from longalign.runtime import Runtime


class MyPart(Reward):
    """Scores an image by the negative squared difference between its mean pixel value and a target.

    Args:
        brightness: the target, in [0, 1].
    """

    def __init__(self, *, brightness: float):
        super().__init__()
        self.brightness = brightness

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        """Builds the reward. Load weights here, onto ``runtime.device``."""
        return cls(brightness=config.brightness)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Returns scores ``(b,)`` of images ``(b, 3, h, w)`` in [0, 1], differentiable with respect to the images."""
        check_pairs(images, prompts)
        return Scores(-(images.mean((1, 2, 3)) - self.brightness).square()).checked(images, prompts)
