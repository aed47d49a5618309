"""The interface of rewards: images and prompts in, one differentiable score per image out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from longalign.rewards.guard import check_scores, guarded
from longalign.segment import check_prompts


@dataclass(frozen=True)
class Scores:
    """Scores of a batch and what they are made of.

    Attributes:
        total: ``(b,)`` what is maximised; differentiable in the images.
        parts: named ``(b,)`` tensors without gradient, logged as curves of their own, e.g. ``text_relevant`` and
            ``text_irrelevant``.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def checked(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """These scores, if there is one finite number for each of the images ``(b, 3, h, w)``.

        Raises:
            NonFiniteReward: with the image and prompt of the first score that is not finite.
            ValueError: if the shapes do not agree.
        """
        check_scores(self.total, images, prompts)
        return self


class Reward(nn.Module):
    """Base of rewards. Modules are frozen; gradient flows into the images only.

    In training mode a reward may be random (a random crop, if it is asked for) and may learn from the batch (a running
    direction); in eval mode the same images and prompts always have the same score.
    """

    #: what it is called in messages: its name in the config, or its class where it is empty
    label: str = ""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images ``(b, 3, h, w)`` in [0, 1] against one prompt each; returns ``(b,)``, higher is better.

        Raises:
            NonFiniteReward: if a score is not finite.
        """
        return guarded(self, images, prompts).total

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """As `score`, with the parts of the score beside the total. Concrete rewards end it with `Scores.checked`."""
        raise NotImplementedError


class EmbeddingReward(Reward):
    """A reward that is a product of unit embeddings, ``s = C_X(x) . C_P(p)`` (LongAlign, paper section 3.2).

    Concrete rewards give the two features; the score, its decomposition and its reweighting follow from them.
    """

    #: width of the embeddings
    dim: int

    def image_features(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] of any resolution to unit embeddings ``(b, d)``, with gradient."""
        raise NotImplementedError

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings ``(b, d)``, without gradient unless the reward is being trained: unit embeddings of the
        whole text in one pass, or the mean over segments of the segments' unit embeddings, which is not normalised
        again (Denscore, paper 3.2)."""
        raise NotImplementedError

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return Scores(total).checked(images, prompts)


class CallableReward(Reward):
    """A plain function ``(images, prompts) -> (b,)`` as a reward."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Any]):
        super().__init__()
        self.function = function
        self.label = getattr(function, "__qualname__", type(function).__name__)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total = self.function(images, prompts)
        check_scores(total, images, prompts, self.label)
        return Scores(total)


def as_reward(part: Any, name: str = "") -> Reward:
    """What the registry built as a `Reward`: rewards as they are, plain callables wrapped.

    Args:
        part: a reward, or a function ``(images, prompts) -> (b,)``.
        name: what it is called in messages; its own name if empty.
    """
    if not isinstance(part, Reward) and not callable(part):
        raise ValueError(f"expected a Reward or a function (images, prompts) -> scores, got {part!r}")
    reward = part if isinstance(part, Reward) else CallableReward(part)
    reward.label = name or reward.label
    return reward


def check_pairs(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless there is exactly one prompt, which is a text, for each image."""
    if isinstance(prompts, str):
        raise ValueError("expected a sequence of prompts, one for each image, got one string; pass [prompt]")
    if len(images) != len(prompts):
        raise ValueError(f"expected one prompt for each image, got {len(images)} images and {len(prompts)} prompts")
    check_prompts(prompts, lists=False)
