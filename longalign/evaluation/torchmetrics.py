"""CLIPScore by segments as a torchmetrics metric. Needs the package torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longalign.registry import PartConfig, rewards
from longalign.rewards.towers import TowerReward
from longalign.runtime import Runtime

try:
    from torchmetrics import Metric  # pyright: ignore[reportMissingImports]
    from torchmetrics.utilities import dim_zero_cat  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "longalign.evaluation.torchmetrics needs the package torchmetrics: pip install 'longalign[torchmetrics]'",
        name=error.name,
    ) from error


class SegmentCLIPScore(Metric):  # pyright: ignore[reportGeneralTypeIssues]
    """Mean CLIPScore (Hessel et al. 2021, arXiv 2104.08718) of images with their prompts, which may have any length.

    A prompt is split into segments of at most CLIP's 77 tokens, so that no text is dropped. The score of an image is
    the mean over the segments of the cosine similarity of segment and image (LongAlign, arXiv 2410.11817, section 3.2).
    Unlike torchmetrics' ``CLIPScore``, it is neither multiplied by 100 nor clipped at 0.

    Args:
        reward: the reward that scores the images: its name, its config, or a built reward. It must have an image and a
            text tower and encode prompts by segments. None means CLIP-H with one segment per sentence.
        **settings: keyword arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: if the reward does not encode prompts by segments.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: list[Tensor]

    def __init__(self, reward: str | Mapping[str, Any] | PartConfig | TowerReward | None = None, **settings: Any):
        super().__init__(**settings)
        if not isinstance(reward, TowerReward):
            reward = rewards.build(reward or {"name": "clip", "text": "segments"}, Runtime.detect())
        if not isinstance(reward, TowerReward) or reward.segmenter is None:
            raise ValueError(
                f"expected a reward that encodes prompts by segments, got {type(reward).__name__}; give a reward with "
                "two towers, such as clip, and set text: segments"
            )
        self.reward = reward
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images: Tensor, prompts: str | Sequence[str]) -> None:
        """Adds the scores of a batch of images.

        Args:
            images: ``(b, 3, h, w)``, floats in [0, 1] or uint8 from 0 to 255.
            prompts: one for each image; may be a single text for one image.

        Raises:
            ValueError: if the numbers of images and prompts differ, or floats are not in [0, 1].
        """
        if images.dtype == torch.uint8:
            images = images.float() / 255
        self.reward.eval()  # `train` of a module that contains the metric would enable random crops
        self.scores.append(self.reward.score(images, [prompts] if isinstance(prompts, str) else prompts))

    def compute(self) -> Tensor:
        """Returns the mean score of all added images, a scalar tensor."""
        return dim_zero_cat(self.scores).mean()
