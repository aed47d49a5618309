"""The interface of rewards: one differentiable score per image and prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from longalign.rewards.guard import check_scores, guarded
from longalign.segmenters import check_prompts


@dataclass(frozen=True)
class Scores:
    """Scores of a batch and their named components.

    Attributes:
        total: ``(b,)`` scores to maximise; differentiable in the images.
        parts: named ``(b,)`` tensors without gradient, logged as separate curves, e.g. ``text_relevant`` and
            ``text_irrelevant``.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def checked(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Returns these scores after checking that each image of ``(b, 3, h, w)`` has one finite score.

        Raises:
            NonFiniteReward: with image and prompt of the first non-finite score.
            ValueError: if the shapes do not match.
        """
        check_scores(self.total, images, prompts)
        return self


class Reward(nn.Module):
    """Base of rewards. Parameters are frozen; gradient flows into the images only.

    In training mode, a reward may be random (a random crop, if configured) and may update its state from the batch (a
    running direction). In eval mode, the same images and prompts always have the same score.
    """

    #: name in messages: the name in the config; if empty, the class name
    label: str = ""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images ``(b, 3, h, w)`` in [0, 1] against one prompt each; returns ``(b,)``, higher is better.

        Raises:
            NonFiniteReward: if a score is not finite.
            ValueError: if the scores are invalid; see `longalign.rewards.guard.guarded`.
        """
        return guarded(self, images, prompts).total

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """As `score`, with named components. Implementations must return ``Scores(...).checked(images, prompts)``."""
        raise NotImplementedError


class EmbeddingReward(Reward):
    """A reward that is a dot product of embeddings, ``s = C_X(x) . C_P(p)`` (LongAlign, paper section 3.2).

    Subclasses implement the two features; score, decomposition and reweighting are computed from them.
    """

    #: width of the embeddings
    dim: int

    def image_features(self, images: Tensor) -> Tensor:
        """Unit embeddings ``(b, d)`` of images ``(b, 3, h, w)`` in [0, 1] of any resolution, with gradient."""
        raise NotImplementedError

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings ``(b, d)`` of prompts, without gradient unless the reward is being trained.

        Either unit embeddings of the whole text, or the mean of the unit embeddings of its segments, which is not
        normalised again (Denscore, paper 3.2).
        """
        raise NotImplementedError

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return Scores(total).checked(images, prompts)


class CallableReward(Reward):
    """Wraps a function ``(images, prompts) -> (b,)`` as a reward."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Any]):
        super().__init__()
        self.function = function
        self.label = getattr(function, "__qualname__", type(function).__name__)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total = self.function(images, prompts)
        check_scores(total, images, prompts, self.label)
        return Scores(total)


def as_reward(part: Any, name: str = "") -> Reward:
    """Converts a part from the registry to a `Reward`: functions are wrapped, rewards returned unchanged.

    Args:
        part: a reward, or a function ``(images, prompts) -> (b,)``.
        name: name in messages; if empty, the present label is kept.

    Raises:
        ValueError: if ``part`` is neither.
    """
    if not isinstance(part, Reward) and not callable(part):
        raise ValueError(f"expected a Reward or a function (images, prompts) -> scores, got {part!r}")
    reward = part if isinstance(part, Reward) else CallableReward(part)
    reward.label = name or reward.label
    return reward


def check_pairs(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless there is exactly one prompt, a string, for each image."""
    if isinstance(prompts, str):
        raise ValueError("expected a sequence of prompts, one for each image, got one string; pass [prompt]")
    if len(images) != len(prompts):
        raise ValueError(f"expected one prompt for each image, got {len(images)} images and {len(prompts)} prompts")
    check_prompts(prompts, lists=False)
