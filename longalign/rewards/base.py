"""Interface of rewards: one differentiable score per image and prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longalign.rewards.guard import check_scores
from longalign.segmenters import check_prompts


@dataclass(frozen=True)
class Scores:
    """Scores of a batch and their named components.

    Attributes:
        total: ``(b,)`` scores to maximize, differentiable with respect to the images.
        parts: named ``(b,)`` tensors without gradient, logged as separate curves, e.g. ``text_relevant`` and
            ``text_irrelevant``.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def checked(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Returns these scores after checking that each image of ``(b, 3, h, w)`` has one finite score.

        Raises:
            NonFiniteReward: if a score is not finite; contains image and prompt of the first such score.
            ValueError: if the shapes do not match.
        """
        check_scores(self.total, images, prompts)
        return self


class Reward(nn.Module):
    """Base class of rewards. Parameters are frozen; only the images receive gradient.

    In training mode, scores may be random, e.g. due to a random crop, and scoring may update state, e.g. a running
    direction. In eval mode, the same images and prompts always have the same score.
    """

    #: name used in messages, as in the config; if empty, the class name is used
    label: str = ""
    #: maximum number of tokens of a text, without special tokens; None if the reward has no such limit
    window: int | None = None

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, without special tokens.

        Raises:
            ValueError: if the reward has no tokenizer.
        """
        name = self.label or type(self).__name__
        raise ValueError(f"the reward '{name}' cannot count tokens; use a segmenter without a token limit: `sentence`")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images ``(b, 3, h, w)`` in [0, 1] against one prompt each; returns ``(b,)``, higher is better.

        Raises:
            NonFiniteReward: if a score is not finite.
            ValueError: if the scores are invalid; see `longalign.rewards.base.guarded`.
        """
        return guarded(self, images, prompts).total

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Returns the scores with their named components.

        Implementations must return ``Scores(...).checked(images, prompts)``.
        """
        raise NotImplementedError

    def score_texts(self, images: Tensor, texts: Sequence[str], image_index: Sequence[int]) -> Tensor:
        """Scores texts against images that several of them share.

        The default repeats the images. Override it to compute what depends only on an image once.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            texts: n texts.
            image_index: index of the image of each text.

        Returns:
            ``(n,)`` scores.
        """
        return guarded(self, images[list(image_index)], texts).total


class EmbeddingReward(Reward):
    """Reward that is a dot product of embeddings, ``s = C_X(x) . C_P(p)`` (LongAlign, paper section 3.2).

    Subclasses implement `image_features` (``C_X``) and `text_features` (``C_P``), from which scores, decomposition and
    edits of the text embedding are computed.
    """

    #: width of the embeddings
    dim: int

    def image_features(self, images: Tensor) -> Tensor:
        """Returns unit embeddings ``(b, d)`` of images ``(b, 3, h, w)`` in [0, 1] of any resolution, with gradient."""
        raise NotImplementedError

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Returns text embeddings ``(b, d)`` of prompts, without gradient unless the reward is trained.

        Each row is the unit embedding of the whole text, or the unnormalized mean of the unit embeddings of its
        segments (Denscore, paper 3.2).
        """
        raise NotImplementedError

    def prefixed_features(self, prompts: Sequence[str], prefix: str) -> Tensor:
        """Returns text embeddings ``(b, d)`` of prompts with a control word or phrase in front, separated by a space.

        Override this method if a prompt is encoded as several texts, so that each of them gets the prefix.
        """
        return self.text_features([f"{prefix} {prompt}".strip() for prompt in prompts])

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return Scores(total).checked(images, prompts)

    def score_texts(self, images: Tensor, texts: Sequence[str], image_index: Sequence[int]) -> Tensor:
        return (self.image_features(images)[list(image_index)] * self.text_features(texts)).sum(-1)


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
    """Converts a registered reward or function to a `Reward`. Functions are wrapped; rewards are returned unchanged.

    Args:
        part: a reward, or a function ``(images, prompts) -> (b,)``.
        name: name used in messages; if empty, the current name is kept.

    Raises:
        ValueError: if ``part`` is neither a reward nor a function.
    """
    if not isinstance(part, Reward) and not callable(part):
        raise ValueError(
            f"expected a Reward or a function (images, prompts) -> scores, got {part!r}; pass one of these"
        )
    reward = part if isinstance(part, Reward) else CallableReward(part)
    reward.label = name or reward.label
    return reward


def check_pairs(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless ``prompts`` contains exactly one string for each image."""
    if isinstance(prompts, str):
        raise ValueError("expected a sequence of prompts, one for each image, got one string; pass [prompt]")
    if len(images) != len(prompts):
        raise ValueError(
            f"expected one prompt for each image, got {len(images)} images and {len(prompts)} prompts; pass one each"
        )
    check_prompts(prompts, lists=False)


def guarded(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Scores:
    """Computes the scores of a reward and checks them, because plugins may violate the interface.

    Args:
        reward: the reward.
        images: ``(b, 3, h, w)`` in [0, 1]. If the images require gradient, the scores must too.
        prompts: one for each image.

    Raises:
        NonFiniteReward: if a score is NaN or infinite.
        ValueError: if there is not one floating-point score per image, if the images require gradient but the scores
            do not, or if the reward modified the images.
    """
    name = reward.label or type(reward).__name__
    before = None if images.is_inference() else images._version
    scores = reward.score_components(images, prompts)
    if before is not None and images._version != before:
        raise ValueError(f"the reward '{name}' modifies its images in place; use a copy (images.clone())")
    check_scores(getattr(scores, "total", scores), images, prompts, name)
    if images.requires_grad and torch.is_grad_enabled() and not scores.total.requires_grad:
        raise ValueError(
            f"the scores of the reward '{name}' have no gradient with respect to the images, which training requires; "
            "compute them without detach, numpy or torch.no_grad"
        )
    return scores
