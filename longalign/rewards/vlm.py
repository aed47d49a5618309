"""Rewards that a vision-language model computes from an image and a text with the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor, nn

from longalign.functional.images import ImageCheck
from longalign.rewards.base import Reward, check_pairs
from longalign.rewards.micro import micro_batched
from longalign.vlm.local import chat_text, escape_special_tokens


class VisionLanguageReward(Reward):
    """Base class of rewards by a frozen vision-language model, with gradient with respect to the images.

    Args:
        model: a transformers model for images and text.
        processor: its processor; see `longalign.vlm.local.load_processor`.
        micro_batch: number of images per pass; None for all; see `micro_batched`.
    """

    def __init__(self, model: nn.Module, processor: Any, micro_batch: int | None):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.processor, self.micro_batch = processor, micro_batch
        self._check_images = ImageCheck()

    def train(self, mode: bool = True) -> Self:
        """Sets training mode; the networks stay in eval mode."""
        super().train(mode)
        for network in self.children():
            network.eval()
        return self

    def count_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer.encode(self._escaped(text), add_special_tokens=False))

    def predict(
        self,
        call: Callable[[Tensor, list[str]], Tensor],
        images: Tensor,
        prompts: Sequence[str],
        template: str,
        placeholder: str,
    ) -> Tensor:
        """Returns the outputs of ``call`` for all pairs of an image and a prompt, at most ``micro_batch`` at a time.

        Args:
            call: gets images on the model's device, and their texts in the model's chat template.
            images: ``(b, 3, h, w)`` in [0, 1].
            prompts: b prompts. Special tokens in them are read as text.
            template: text for the model.
            placeholder: part of the template that is replaced by the prompt.

        Raises:
            ValueError: if the numbers of images and prompts differ, or the images are invalid.
        """
        check_pairs(images, prompts)
        self._check_images(images)
        texts = [
            chat_text(self.processor, template.replace(placeholder, self._escaped(prompt)), 1) for prompt in prompts
        ]
        return micro_batched(call, self.micro_batch, images.to(self.model.device), texts)

    def _escaped(self, text: str) -> str:
        return escape_special_tokens(self.processor.tokenizer, text)
