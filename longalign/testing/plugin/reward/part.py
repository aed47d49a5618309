"""The reward `my-part`."""

from __future__ import annotations

from collections.abc import Sequence

from my_plugin.config import MyPartConfig
from torch import Tensor

from longalign.rewards import Reward, Scores, check_pairs
from longalign.runtime import Runtime


class MyPart(Reward):
    """Negative squared distance of the mean pixel value to a target.

    Args:
        brightness: the target.
    """

    def __init__(self, *, brightness: float):
        super().__init__()
        self.brightness = brightness

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        """Load weights here, onto ``runtime.device``."""
        return cls(brightness=config.brightness)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Scores images ``(b, 3, h, w)`` in [0, 1]; returns ``(b,)``, differentiable in the images."""
        check_pairs(images, prompts)
        return Scores(-(images.mean((1, 2, 3)) - self.brightness).square()).checked(images, prompts)
