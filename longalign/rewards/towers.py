"""Rewards from two-tower models: an image encoder and a text encoder (towers) with a shared embedding space."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from einops import reduce
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from longalign import registry
from longalign.encoders.bucketing import group_by_length
from longalign.errors import shorten
from longalign.functional.images import ImageCheck, ImagePreprocessor, at_least_float32
from longalign.rewards.base import EmbeddingReward, check_pairs
from longalign.rewards.config import TowerRewardConfig
from longalign.rewards.micro import micro_batched
from longalign.runtime import Runtime
from longalign.segmenters import Segmenter, Sentence, check_prompts, split, windows

#: maximum number of token positions, padding included, that the text tower encodes at a time
NUM_POSITIONS_PER_PASS = 64 * 77


class Towers(nn.Module):
    """Interface of the image encoder and the text encoder (towers) of a `TowerReward`.

    There is one subclass for each model library, such as transformers and open_clip.
    """

    #: width of the embeddings
    dim: int
    #: maximum number of tokens of the text tower, without special tokens
    window: int

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, without special tokens."""
        raise NotImplementedError(f"{type(self).__name__} must implement count_tokens")

    def num_positions(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of positions, padding included, that each text occupies in a pass of the text tower.

        Texts with similar numbers of positions are encoded together. The default is `window` for every text. Override
        this method if the text tower does not pad every text to `window` tokens.
        """
        return [self.window] * len(texts)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Returns unnormalized embeddings ``(b, d)`` of images, with gradient.

        Args:
            pixels: ``(b, 3, h, w)`` images, resized and normalized by an `ImagePreprocessor`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement embed_pixels")

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unnormalized embeddings ``(n, d)`` of n texts. Texts longer than `window` are truncated."""
        raise NotImplementedError(f"{type(self).__name__} must implement embed_texts")

    # Hooks used by the trainer `denscore`

    def train_only(self, which: str) -> None:
        """Makes `logit_scale` and the weights selected by ``which`` trainable, and freezes all other weights.

        Args:
            which: ``"all"`` for both towers, ``"text"`` or ``"vision"`` for one tower with its projection to the
                embedding space, or ``"projections"`` for both projections alone.

        Raises:
            ValueError: if the towers do not support training. The base class always raises it.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be trained; use a reward with a transformers CLIPModel: clip, pickscore or "
            "denscore"
        )

    @property
    def logit_scale(self) -> nn.Parameter:
        """Scalar parameter: natural logarithm of the factor (inverse temperature) of the cosines in a training loss."""
        raise NotImplementedError(f"{type(self).__name__} must implement logit_scale")

    def enable_gradient_checkpointing(self) -> None:
        """Enables gradient checkpointing of both towers to save memory."""
        raise NotImplementedError(f"{type(self).__name__} must implement enable_gradient_checkpointing")

    def save(self, folder: Path, preprocessor: ImagePreprocessor) -> None:
        """Saves the model, the tokenizer and the image settings to a folder that is a checkpoint of the reward.

        Args:
            folder: the folder, created if needed.
            preprocessor: the image settings.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement save")


@dataclass(frozen=True)
class ImageInput:
    """How a checkpoint's image tower expects its images.

    Attributes:
        size: side of a square image in pixels, or ``(height, width)``.
        mean: number for each RGB channel that is subtracted from images in [0, 1].
        std: number for each RGB channel by which the difference is divided.
        interpolation: how images are resized: ``"bicubic"`` or ``"bilinear"``.
    """

    size: int | Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"


class TowerReward(EmbeddingReward):
    """Cosine similarity of an image and its prompt, in [-1, 1]. A long prompt is encoded as several texts.

    The window is the text tower's maximum number of tokens, without special tokens.

    Args:
        towers: image encoder and text encoder. They are frozen here, and stay in eval mode while they are frozen.
        preprocessor: preprocesses images in [0, 1] for the image tower. Random crops are used in training mode only.
        segmenter: splits prompts into segments, e.g. sentences. The text embedding of a prompt is the unnormalized
            mean of the unit embeddings of its segments, so the score is the mean cosine (Denscore, paper 3.2). With
            None, a prompt that fits the window is encoded in one pass. The segments of a longer prompt are then windows
            of whole sentences.
        micro_batch: number of images per pass of the image tower; fewer need less memory. None: all at once.
        truncate: whether a text that is longer than the window is truncated, with one warning. The text is a segment,
            or the whole prompt if ``segmenter`` is None. If False, such texts are split further.
    """

    def __init__(
        self,
        towers: Towers,
        preprocessor: ImagePreprocessor,
        *,
        segmenter: Segmenter | None,
        micro_batch: int | None,
        truncate: bool,
    ):
        super().__init__()
        self.towers = towers.requires_grad_(False).eval()
        self.preprocessor = preprocessor
        self.segmenter = segmenter
        self.truncate = truncate
        self.micro_batch = micro_batch
        self.dim, self.window = towers.dim, towers.window
        self._check_images = ImageCheck()
        self._warned = False

    @classmethod
    def from_towers(
        cls, towers: Towers, image: ImageInput | ImagePreprocessor, config: TowerRewardConfig, runtime: Runtime
    ) -> Self:
        """Builds the reward from loaded towers and a config.

        Args:
            towers: image encoder and text encoder.
            image: image settings of the checkpoint, from which a preprocessor is made; settings of ``config`` replace
                them. A preprocessor is used as it is, and the image settings of ``config`` are ignored.
            config: config of the reward.
            runtime: device and dtype to which the towers are moved.
        """
        return cls(
            towers.to(device=runtime.device, dtype=runtime.torch_dtype),
            image if isinstance(image, ImagePreprocessor) else _preprocessor(image, config),
            segmenter=registry.segmenters.build(config.segmenter, runtime) if config.segmenter else None,
            micro_batch=config.micro_batch,
            truncate=config.text == "whole" or config.truncate_segments,
        )

    def train(self, mode: bool = True) -> Self:
        """Sets training or eval mode and returns the reward; frozen towers stay in eval mode."""
        super().train(mode)
        if not self._trainable():
            self.towers.eval()
        return self

    def count_tokens(self, text: str) -> int:
        return self.towers.count_tokens(text)

    def _trainable(self) -> bool:
        return any(p.requires_grad for p in self.towers.parameters())

    def image_features(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Returns embeddings ``(b, d)`` of images, of norm 1, with gradient.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1], of any size, on any device.
            generator: CPU generator for the positions of random crops. None uses torch's global generator.

        Raises:
            ValueError: if the images have a wrong shape, an integer dtype or values outside [-0.1, 1.1], or are smaller
                than the random crop.
        """
        self._check_images(images)
        device = next(self.towers.parameters()).device
        pixels = self.preprocessor(images, generator, random=self.training).to(device)
        features = micro_batched(self.towers.embed_pixels, self.micro_batch, pixels, trainable=self._trainable())
        return F.normalize(at_least_float32(features), dim=-1)

    def segments(self, prompt: str) -> list[str]:
        """Returns the texts into which a prompt is split for encoding, in order; one empty text for an empty prompt."""
        return self._segments(prompt, self.segmenter)

    def _segments(self, prompt: str, segmenter: Segmenter | None, reserved: int = 0) -> list[str]:
        """Returns the texts as which a prompt is encoded.

        Args:
            prompt: the prompt.
            segmenter: splits the prompt into segments. None splits only prompts longer than the window, into windows.
                With ``self.truncate``, texts that are too long are not split further.
            reserved: number of tokens of the window that each text leaves free, e.g. for a prefix.
        """
        window, count = self.towers.window - reserved, self.towers.count_tokens
        if segmenter is None:
            return [prompt] if self.truncate else windows(prompt, window, count)
        # strip: surrounding whitespace carries no content
        truncated = self.truncate and segmenter is self.segmenter
        segments = [s.strip() for s in split(segmenter, prompt, count, None if truncated else window)]
        return [s for s in segments if s] or [""]

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return _means(*self.segment_features(prompts))

    def prefixed_features(self, prompts: Sequence[str], prefix: str) -> Tensor:
        """Returns text embeddings ``(b, d)`` of prompts with a word or phrase in front of each text that is encoded.

        A prompt is split as without the prefix, except that each text must leave room in the window for the prefix.

        Args:
            prompts: b prompts.
            prefix: the word or phrase; an empty one adds nothing.

        Raises:
            ValueError: if the prefix leaves no token of the window for the prompt.
        """
        reserved = self.towers.count_tokens(prefix)
        if reserved >= self.towers.window:
            raise ValueError(
                f"the control word {shorten(prefix)} has {reserved} tokens and the reward's text tower a window of "
                f"{self.towers.window}, which leaves no token for the prompt; use a shorter control word"
            )
        return _means(*self.segment_features(prompts, prefix))

    def segment_features(self, prompts: Sequence[str], prefix: str = "") -> tuple[Tensor, list[list[str]]]:
        """Splits prompts into segments and encodes these.

        Args:
            prompts: b prompts.
            prefix: word or phrase that is put in front of each segment, separated by a space; empty: none.

        Returns:
            ``(embeddings, texts)``. The embeddings ``(n, d)`` of the n segments of all prompts, in order, have norm 1,
            and have gradient if the towers are trainable. The texts of the segments are one list for each prompt.
        """
        checked: list[Any] = check_prompts(prompts, lists=False)
        reserved = self.towers.count_tokens(prefix) if prefix else 0
        segments = [self._segments(prompt, self.segmenter, reserved) for prompt in checked]
        if prefix:
            segments = [[f"{prefix} {text}".strip() for text in texts] for texts in segments]
        return self._embed(segments)

    @torch.no_grad()
    def by_segment(
        self, images: Tensor, prompts: Sequence[str], segmenter: Segmenter | None = None
    ) -> list[list[tuple[str, float]]]:
        """Scores each segment of a prompt against the image, to show which parts of the prompt the image depicts.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            prompts: one for each image.
            segmenter: splits prompts. None uses the reward's segmenter, or splits into sentences if the reward has
                none.

        Returns:
            For each prompt, the text of each segment and its cosine similarity with the image. If the reward has a
            segmenter and uses it here, the mean over a prompt's segments is the reward's score.
        """
        check_pairs(images, prompts)
        return self.score_segments(self.image_features(images), prompts, segmenter)

    @torch.no_grad()
    def score_segments(
        self, features: Tensor, prompts: Sequence[str], segmenter: Segmenter | None = None
    ) -> list[list[tuple[str, float]]]:
        """Returns what `by_segment` returns, for images whose embeddings are already computed.

        Args:
            features: ``(b, d)`` embeddings of the images, from `image_features`.
            prompts: one for each image.
            segmenter: splits prompts; None: as in `by_segment`.
        """
        checked: list[Any] = check_prompts(prompts, lists=False)
        segmenter = segmenter or self.segmenter or Sentence()
        embeddings, segments = self._embed([self._segments(prompt, segmenter) for prompt in checked])
        image_index = [i for i, texts in enumerate(segments) for _ in texts]
        scores = iter((features.to(embeddings.device)[image_index] * embeddings).sum(-1).tolist())
        return [[(text, next(scores)) for text in texts] for texts in segments]

    def _embed(self, segments: list[list[str]]) -> tuple[Tensor, list[list[str]]]:
        if self.truncate:
            self._warn_if_truncated(segments)
        index = {text: i for i, text in enumerate(dict.fromkeys(text for texts in segments for text in texts))}
        embeddings = self._unit_embeddings(list(index))
        return embeddings[[index[text] for texts in segments for text in texts]], segments

    def save(self, folder: Path) -> None:
        """Saves model, tokenizer and image settings to a folder, created if needed: a checkpoint of the reward."""
        self.towers.save(folder, self.preprocessor)

    def _unit_embeddings(self, texts: list[str]) -> Tensor:
        calls = group_by_length(self.towers.num_positions(texts), limit=NUM_POSITIONS_PER_PASS)
        embeddings = torch.cat([self.towers.embed_texts([texts[i] for i in call]) for call in calls])
        embeddings = F.normalize(at_least_float32(embeddings), dim=-1)
        order = torch.tensor([i for call in calls for i in call])
        return embeddings[order.argsort().to(embeddings.device)]

    def _warn_if_truncated(self, segments: Sequence[Sequence[str]]) -> None:
        if self._warned:
            return
        window = self.towers.window
        unit, advice = "prompt", "text: auto` or `text: segments"
        if self.segmenter is not None:
            unit, advice = "segment", "truncate_segments: false"
        for text in (text for texts in segments for text in texts):
            count = self.towers.count_tokens(text)
            if count > window:
                self._warned = True
                warnings.warn(
                    f"a {unit} has {count} tokens, but the reward's text tower has a window of {window}: the rest is "
                    f"not scored. Set `{advice}` to score the whole prompt (only warned once)",
                    stacklevel=6,
                )
                return


def _means(embeddings: Tensor, segments: list[list[str]]) -> Tensor:
    """Returns the mean embedding of each prompt, ``(b, d)``.

    Args:
        embeddings: ``(n, d)`` embeddings of the segments of all prompts, in order.
        segments: the segments of each of the b prompts, n in total.
    """
    by_prompt = embeddings.split([len(texts) for texts in segments])
    return torch.stack([reduce(rows, "segments d -> d", "mean") for rows in by_prompt])


def _preprocessor(image: ImageInput, config: TowerRewardConfig) -> ImagePreprocessor:
    height, width = (image.size, image.size) if isinstance(image.size, int) else image.size
    return ImagePreprocessor(
        (height, width),
        tuple(image.mean),
        tuple(image.std),
        aspect=config.aspect,
        crop=config.crop,
        interpolation=config.interpolation or image.interpolation,
        crop_position=config.crop_position,
    )
