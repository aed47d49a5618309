"""Interface of rewards: modules that score images against their prompts, one number per image."""

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
    """Scores of a batch of b images with their prompts, and named components of the scores.

    Attributes:
        total: ``(b,)`` floating-point scores to maximize, differentiable with respect to the images.
        parts: named ``(b,)`` tensors without gradient, logged as separate curves, e.g. the terms of a sum. They need
            not add up to ``total``.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def checked(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Checks that ``total`` has one finite score for each image, and returns this object.

        Args:
            images: ``(b, 3, h, w)`` images that were scored.
            prompts: their b prompts.

        Raises:
            NonFiniteReward: if a score is not finite. The error contains image and prompt of the first non-finite
                score.
            ValueError: if ``total`` is not a floating-point tensor of shape ``(b,)``.
        """
        check_scores(self.total, images, prompts)
        return self


class Reward(nn.Module):
    """Base class of rewards, which score images against their prompts. Subclasses implement `score_components`.

    Parameters are frozen, so only the images receive gradient, unless the reward itself is trained. In training mode,
    scores may be random, e.g. due to a random crop, and scoring may update buffers, e.g. a running mean. In eval mode,
    the same batch of images and prompts always has the same scores.
    """

    #: name used in messages, as in the config; if empty, the class name is used
    label: str = ""
    #: maximum number of tokens of a text, without special tokens; None if the reward has no such limit
    window: int | None = None

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, without special tokens, by the reward's tokenizer.

        Raises:
            ValueError: if the reward has no tokenizer. The base class always raises it.
        """
        name = self.label or type(self).__name__
        raise ValueError(f"the reward '{name}' cannot count tokens; use a segmenter without a token limit: `sentence`")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images ``(b, 3, h, w)`` in [0, 1] against one prompt each; returns ``(b,)``, higher is better.

        Raises:
            NonFiniteReward: if a score is NaN or infinite.
            ValueError: if the numbers of images and prompts differ, or the reward returns invalid scores, as listed in
                `longalign.rewards.base.guarded`.
        """
        return guarded(self, images, prompts).total

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Returns the scores of a batch of b images and named components of the scores.

        Subclasses must return ``Scores(...).checked(images, prompts)``. Do not call this method directly: call `score`,
        or `guarded` if the components are needed too.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1]; the scores must have gradient with respect to them.
            prompts: b prompts, one for each image.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement score_components")

    def score_texts(self, images: Tensor, texts: Sequence[str], image_index: Sequence[int]) -> Tensor:
        """Scores texts of which several may belong to one image, such as the sentences of its prompt.

        The default scores a copy of the image for each text. Override this method to encode each image only once.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            texts: n texts.
            image_index: for each text, the index in ``images`` of the image that it is scored against.

        Returns:
            ``(n,)`` scores, higher is better.

        Raises:
            NonFiniteReward, ValueError: in the cases of `score`.
        """
        return guarded(self, images[list(image_index)], texts).total


class EmbeddingReward(Reward):
    """Reward that is a dot product of embeddings, ``s = C_X(x) . C_P(p)`` (LongAlign, paper section 3.2).

    ``x`` is an image and ``p`` its prompt. Subclasses implement `image_features` (``C_X``) and `text_features`
    (``C_P``). Only such rewards can be decomposed (`longalign.functional.preference`) or have their text embedding
    changed (`longalign.edits`).
    """

    #: width of the embeddings
    dim: int

    def image_features(self, images: Tensor) -> Tensor:
        """Returns embeddings ``(b, d)`` of norm 1 of images ``(b, 3, h, w)`` in [0, 1] of any size, with gradient."""
        raise NotImplementedError(f"{type(self).__name__} must implement image_features")

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Returns text embeddings ``(b, d)`` of b prompts, without gradient unless the reward is trained.

        Each row has norm 1 and is the embedding of a whole prompt. If the reward splits prompts into segments, e.g.
        sentences, a row is instead the mean of the segments' embeddings of norm 1 and is not normalized again
        (Denscore, paper 3.2).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement text_features")

    def prefixed_features(self, prompts: Sequence[str], prefix: str) -> Tensor:
        """Returns text embeddings ``(b, d)`` of prompts with a word or phrase in front, separated by a space.

        Override this method if a prompt is encoded as several texts, so that each text gets the prefix.

        Args:
            prompts: b prompts.
            prefix: the word or phrase; an empty one adds nothing.
        """
        return self.text_features([f"{prefix} {prompt}".strip() for prompt in prompts])

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        total = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return Scores(total).checked(images, prompts)

    def score_texts(self, images: Tensor, texts: Sequence[str], image_index: Sequence[int]) -> Tensor:
        return (self.image_features(images)[list(image_index)] * self.text_features(texts)).sum(-1)


class CallableReward(Reward):
    """Reward of a function that maps images ``(b, 3, h, w)`` in [0, 1] and b prompts to scores ``(b,)``."""

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
    """Returns a `Reward` for a reward or a function, and sets the label of the returned reward.

    Args:
        part: a `Reward`, which is returned itself, or a function that maps images ``(b, 3, h, w)`` and b prompts to
            scores ``(b,)``, which is wrapped in a `CallableReward`.
        name: new `Reward.label`, used in messages; if empty, the label is not changed.

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
    """Raises ValueError unless ``prompts`` is a sequence of strings, one for each of the images ``(b, 3, h, w)``."""
    if isinstance(prompts, str):
        raise ValueError("expected a sequence of prompts, one for each image, got one string; pass [prompt]")
    if len(images) != len(prompts):
        raise ValueError(
            f"expected one prompt for each image, got {len(images)} images and {len(prompts)} prompts; pass "
            "equal numbers"
        )
    check_prompts(prompts, lists=False)


def guarded(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Scores:
    """Computes the scores of a reward and checks them, because plugins may violate the interface of `Reward`.

    Args:
        reward: the reward.
        images: ``(b, 3, h, w)`` in [0, 1].
        prompts: b prompts, one for each image.

    Returns:
        What ``reward.score_components(images, prompts)`` returned.

    Raises:
        NonFiniteReward: if a score is NaN or infinite.
        ValueError: if there is not one floating-point score per image, if the images require gradient but the scores
            do not, or if the reward modified the images in place.
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
