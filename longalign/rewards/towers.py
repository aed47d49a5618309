"""Rewards from two-tower models: an image tower and a text tower with a shared embedding space."""

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

NUM_POSITIONS_PER_PASS = 64 * 77


class Towers(nn.Module):
    """Interface of a two-tower model for `TowerReward`, with one subclass for each model library."""

    #: width of the embeddings
    dim: int
    #: maximum number of tokens of the text tower, without special tokens
    window: int

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, without special tokens."""
        raise NotImplementedError

    def num_positions(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of positions of each text in a pass of the text tower.

        Override this method if the text tower does not pad every text to the window.
        """
        return [self.window] * len(texts)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Returns unnormalized embeddings ``(b, d)`` of preprocessed images ``(b, 3, h, w)``, with gradient."""
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unnormalized embeddings ``(n, d)`` of texts. Texts longer than the window are truncated."""
        raise NotImplementedError

    # Hooks used by the trainer `denscore`

    def train_only(self, which: str) -> None:
        """Makes the temperature and the weights selected by ``which`` trainable, and freezes all other weights.

        ``which`` is ``"all"``, ``"projections"``, or one tower with its projection: ``"text"`` or ``"vision"``.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be trained; use a reward with a transformers CLIPModel: clip, pickscore or "
            "denscore"
        )

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse softmax temperature, a scalar."""
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        """Enables gradient checkpointing of both towers to save memory."""
        raise NotImplementedError

    def save(self, folder: Path, preprocessor: ImagePreprocessor) -> None:
        """Saves the model and the image settings to a folder from which the reward can be loaded."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageInput:
    """Image settings of a checkpoint: size in pixels (one side or both), mean, standard deviation, interpolation."""

    size: int | Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"


class TowerReward(EmbeddingReward):
    """Unscaled cosine similarity of an image and its prompt, with the prompt encoded whole or in segments.

    Args:
        towers: the model, which is frozen here and stays in eval mode while frozen.
        preprocessor: preprocesses images in [0, 1] for the image tower. Random crops are used in training mode only.
        segmenter: splits prompts. The text embedding is the unnormalized mean of the unit embeddings of all segments
            (Denscore, paper 3.2). With None, a prompt that fits the window is encoded in one pass, and a longer prompt
            is split into windows of whole sentences.
        truncate: whether to encode only the first window of a longer segment, or of a longer prompt if ``segmenter`` is
            None, and to warn once. If False, it is split further.
        micro_batch: number of images per pass of the image tower; None for all; see `micro_batched`.
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
        """Builds the reward from loaded towers and a config, with the device and dtype of ``runtime``.

        Args:
            towers: the model.
            image: image settings of the checkpoint, or a preprocessor with the config's ``aspect`` and ``crop``.
            config: config of the reward.
            runtime: device and dtype.
        """
        return cls(
            towers.to(device=runtime.device, dtype=runtime.torch_dtype),
            image if isinstance(image, ImagePreprocessor) else _preprocessor(image, config),
            segmenter=registry.segmenters.build(config.segmenter, runtime) if config.segmenter else None,
            micro_batch=config.micro_batch,
            truncate=config.text == "whole" or config.truncate_segments,
        )

    def train(self, mode: bool = True) -> Self:
        """Sets training mode; frozen towers stay in eval mode."""
        super().train(mode)
        if not self._trainable():
            self.towers.eval()
        return self

    def count_tokens(self, text: str) -> int:
        return self.towers.count_tokens(text)

    def _trainable(self) -> bool:
        return any(p.requires_grad for p in self.towers.parameters())

    def image_features(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Returns unit embeddings ``(b, d)`` of images ``(b, 3, h, w)`` in [0, 1], on any device.

        Args:
            images: images of any resolution.
            generator: CPU generator for the positions of random crops. None uses torch's global generator.

        Raises:
            ValueError: if `ImageCheck` rejects the images.
        """
        self._check_images(images)
        device = next(self.towers.parameters()).device
        pixels = self.preprocessor(images, generator, random=self.training).to(device)
        features = micro_batched(self.towers.embed_pixels, self.micro_batch, pixels, trainable=self._trainable())
        return F.normalize(at_least_float32(features), dim=-1)

    def segments(self, prompt: str) -> list[str]:
        """Returns the texts encoded for one prompt, in order. For an empty prompt, this is one empty text."""
        return self._segments(prompt, self.segmenter)

    def _segments(self, prompt: str, segmenter: Segmenter | None, reserved: int = 0) -> list[str]:
        """Returns the texts of a prompt, each with ``reserved`` tokens less than the window."""
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
        """Returns text embeddings ``(b, d)`` of prompts with a control word in front of each text that is encoded.

        The texts are those of the prompt without the prefix, but each has fewer tokens of the window left.

        Raises:
            ValueError: if the prefix fills the window.
        """
        reserved = self.towers.count_tokens(prefix)
        if reserved >= self.towers.window:
            raise ValueError(
                f"the control word {shorten(prefix)} has {reserved} tokens and the reward's text tower a window of "
                f"{self.towers.window}, which leaves none for the prompt; use a shorter one"
            )
        return _means(*self.segment_features(prompts, prefix))

    def segment_features(self, prompts: Sequence[str], prefix: str = "") -> tuple[Tensor, list[list[str]]]:
        """Returns unit embeddings ``(n, d)`` of the segments of all prompts, in order, and the segments of each prompt.

        The embeddings have gradient if the towers are trainable. Each segment starts with the prefix and a space, if
        there is one.
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
            segmenter: splits prompts. None uses the reward's segmenter, or the ``sentence`` segmenter if the reward has
                none.

        Returns:
            For each prompt, the text of each segment and its cosine similarity with the image. With the reward's
            segmenter, the mean over the segments is the reward's score.
        """
        check_pairs(images, prompts)
        return self.score_segments(self.image_features(images), prompts, segmenter)

    @torch.no_grad()
    def score_segments(
        self, features: Tensor, prompts: Sequence[str], segmenter: Segmenter | None = None
    ) -> list[list[tuple[str, float]]]:
        """Returns the scores of `by_segment`, given the `image_features` ``(b, d)``."""
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
        """Saves the model to a folder, created if needed, from which the reward can be loaded."""
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
    """Returns the mean embedding ``(b, d)`` of the segments of each prompt."""
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
