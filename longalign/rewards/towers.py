"""Rewards with two towers: any pair of an image and a text encoder that share an embedding space."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longalign import registry
from longalign.images import ImageCheck, ImagePreprocessor, at_least_float32
from longalign.rewards.base import EmbeddingReward, check_pairs
from longalign.rewards.configs import TowerRewardConfig
from longalign.runtime import Runtime
from longalign.segment import Segmenter, Sentence, check_prompts, group_by_length, split, windows

NUM_POSITIONS_PER_PASS = 64 * 77


class Towers(nn.Module):
    """What `TowerReward` needs of a model; one small subclass for each library that models come from."""

    #: width of the embeddings
    dim: int
    #: number of tokens the text tower reads, without special tokens
    window: int

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        raise NotImplementedError

    def num_positions(self, texts: Sequence[str]) -> list[int]:
        """Positions that each text takes in a pass of the text tower; of a pass, the longest text counts. Here it is
        the window: towers that do not pad every text to it say so."""
        return [self.window] * len(texts)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels ``(b, 3, h, w)`` to embeddings ``(b, d)`` of any length, with gradient."""
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings ``(n, d)`` of any length; what exceeds the window is cut (callers see to it)."""
        raise NotImplementedError

    # What the trainer `denscore` asks for

    def train_only(self, what: str) -> None:
        """Makes ``"all"`` weights trainable, those of the ``"text"`` or the ``"vision"`` tower with its projection, or
        both ``"projections"`` alone; the temperature always."""
        raise ValueError(f"{type(self).__name__} cannot be trained; expected a reward from a transformers CLIPModel")

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature of the model's softmax, a scalar."""
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in the backward pass through both towers."""
        raise NotImplementedError

    def save(self, folder: Path, pixels: ImagePreprocessor) -> None:
        """Writes the model into a folder that the reward can be loaded from; ``pixels`` is what it reads."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageInput:
    """What the image tower of a checkpoint reads: size in pixels (one side or both), mean and standard deviation."""

    size: int | Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]


class TowerReward(EmbeddingReward):
    """The unscaled cosine of an image and its prompt, the prompt read in one pass or segment by segment.

    Args:
        towers: the model; it is frozen, and kept in eval mode as long as it is.
        pixels: turns images in [0, 1] into what the image tower reads. A random crop is taken in training mode only.
        segmenter: splits prompts; the text embedding is then the mean over segments of their unit embeddings, not
            normalised again (Denscore, paper 3.2). Segments longer than the window are split further. None reads a
            prompt in one pass if it fits the window, and a longer one in windows of whole sentences, of which it takes
            the mean likewise.
        truncate: without a segmenter, reads one window of a longer prompt; of what is not read a warning is given once.
        micro_batch: images in one pass of the image tower, None for all. Under autograd each pass is recomputed in
            the backward, so that the memory of one pass is needed at a time; the gradient is the same.
    """

    def __init__(
        self, towers: Towers, pixels: ImagePreprocessor, *, segmenter: Segmenter | None = None,
        micro_batch: int | None = None, truncate: bool = False,
    ):  # fmt: skip
        super().__init__()
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 image, not {micro_batch}; leave it out for all at once")
        self.towers = towers.requires_grad_(False).eval()
        self.pixels = pixels
        self.segmenter = segmenter
        self.truncate = truncate
        self.micro_batch = micro_batch
        self.dim = towers.dim
        self._check_images = ImageCheck()
        self._warned = False

    @classmethod
    def from_towers(cls, towers: Towers, image: ImageInput, config: TowerRewardConfig, runtime: Runtime) -> TowerReward:
        """Puts loaded towers on the runtime's device in its dtype, with what a config says of images and texts."""
        height, width = (image.size, image.size) if isinstance(image.size, int) else image.size
        return cls(
            towers.to(device=runtime.device, dtype=runtime.torch_dtype),
            ImagePreprocessor(
                (height, width), tuple(image.mean), tuple(image.std), aspect=config.aspect, crop=config.crop
            ),
            segmenter=registry.segmenters.build(config.segmenter, runtime) if config.segmenter else None,
            micro_batch=config.micro_batch,
            truncate=config.text == "whole",
        )

    def train(self, mode: bool = True) -> TowerReward:
        """Switches the reward's own behaviour; frozen towers stay in eval mode."""
        super().train(mode)
        if not self._trained():
            self.towers.eval()
        return self

    def _trained(self) -> bool:
        return any(p.requires_grad for p in self.towers.parameters())

    def image_features(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Unit embeddings ``(b, d)`` of images ``(b, 3, h, w)`` in [0, 1], on any device; the generator places random
        crops.

        Raises:
            ValueError: for images that `ImageCheck` rejects.
        """
        self._check_images(images)
        pixels = self.pixels(images, generator, random=self.training).to(next(self.towers.parameters()).device)
        if self.micro_batch is None or len(pixels) <= self.micro_batch:
            features = self.towers.embed_pixels(pixels)
        else:
            features = torch.cat([self._pass(chunk) for chunk in pixels.split(self.micro_batch)])
        return F.normalize(at_least_float32(features), dim=-1)

    def _pass(self, pixels: Tensor) -> Tensor:
        trained = self._trained()
        if not (torch.is_grad_enabled() and (pixels.requires_grad or trained)):
            return self.towers.embed_pixels(pixels)
        features = checkpoint(self.towers.embed_pixels, pixels, use_reentrant=False, preserve_rng_state=trained)
        assert isinstance(features, Tensor)
        return features

    def segments(self, prompt: str) -> list[str]:
        """The texts that are encoded for one prompt, in order; at least one, which is empty for an empty prompt."""
        return self._segments(prompt, self.segmenter)

    def _segments(self, prompt: str, segmenter: Segmenter | None) -> list[str]:
        window, count = self.towers.window, self.towers.count_tokens
        if segmenter is None:
            return [prompt] if self.truncate else windows(prompt, window, count)
        # blanks around a segment say where it stood, not what it says
        found = [s.strip() for s in split(segmenter, prompt, count, window)]
        return [s for s in found if s] or [""]

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        unit, split = self.segment_features(prompts)
        return torch.stack([segments.mean(0) for segments in unit.split([len(segments) for segments in split])])

    def segment_features(self, prompts: Sequence[str]) -> tuple[Tensor, list[list[str]]]:
        """Unit embeddings ``(n, d)`` of the segments of all prompts in their order, and the segments of each prompt.

        With gradient where the towers are trained.
        """
        checked: list[Any] = check_prompts(prompts, lists=False)
        if self.segmenter is None and self.truncate:
            self._warn_if_truncated(checked)
        return self._embed([self.segments(prompt) for prompt in checked])

    @torch.no_grad()
    def by_segment(
        self, images: Tensor, prompts: Sequence[str], segmenter: Segmenter | None = None
    ) -> list[list[tuple[str, float]]]:
        """Which part of each prompt its image shows: the segments with their scores.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            prompts: one for each image.
            segmenter: splits prompts; None takes the reward's own, or sentences where it has none.

        Returns:
            For each prompt its segments in order, each with its text and its cosine with the image. With the reward's
            own segmenter their mean is the reward's score.
        """
        check_pairs(images, prompts)
        checked: list[Any] = check_prompts(prompts, lists=False)
        segmenter = segmenter or self.segmenter or Sentence()
        text, found = self._embed([self._segments(prompt, segmenter) for prompt in checked])
        owner = [i for i, segments in enumerate(found) for _ in segments]
        scores = iter((self.image_features(images)[owner] * text).sum(-1).tolist())
        return [[(segment, next(scores)) for segment in segments] for segments in found]

    def _embed(self, found: list[list[str]]) -> tuple[Tensor, list[list[str]]]:
        places = {text: i for i, text in enumerate(dict.fromkeys(s for segments in found for s in segments))}
        unit = self._unit_embeddings(list(places))
        return unit[[places[s] for segments in found for s in segments]], found

    def save(self, folder: Path) -> None:
        """Writes the model into a folder, which is made if it is missing, for this kind of reward to be loaded from."""
        self.towers.save(folder, self.pixels)

    def _unit_embeddings(self, texts: list[str]) -> Tensor:
        calls = group_by_length(self.towers.num_positions(texts), limit=NUM_POSITIONS_PER_PASS)
        found = torch.cat([self.towers.embed_texts([texts[i] for i in call]) for call in calls])
        unit = F.normalize(at_least_float32(found), dim=-1)
        order = torch.tensor([i for call in calls for i in call])
        return unit[order.argsort().to(unit.device)]

    def _warn_if_truncated(self, prompts: Sequence[str]) -> None:
        if self._warned:
            return
        window = self.towers.window
        for prompt in prompts:
            count = self.towers.count_tokens(prompt)
            if count > window:
                self._warned = True
                warnings.warn(
                    f"a prompt has {count} tokens and the reward's text tower reads {window}: its end is not scored; "
                    "set `text: auto` or `segments` to score all of it (this warning is given once)",
                    stacklevel=5,
                )
                return
