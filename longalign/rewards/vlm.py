"""Rewards that a vision-language model computes from an image and a text that contains the prompt."""

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
        processor: the model's processor, from `longalign.vlm.local.load_processor`.
        micro_batch: number of images per pass of the model; fewer need less memory. None: all at once.
    """

    def __init__(self, model: nn.Module, processor: Any, micro_batch: int | None):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.processor, self.micro_batch = processor, micro_batch
        self._check_images = ImageCheck()

    def train(self, mode: bool = True) -> Self:
        """Sets training or eval mode of the reward and returns the reward; its networks stay in eval mode."""
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
        """Formats the text of each prompt and returns the outputs of ``call``, at most ``micro_batch`` at a time.

        Args:
            call: maps m images ``(m, 3, h, w)`` in [0, 1] on the model's device, and their m texts in the model's chat
                template, to a tensor with m rows.
            images: ``(b, 3, h, w)`` in [0, 1].
            prompts: b prompts. Names of special tokens in a prompt are read as ordinary text.
            template: text for the model, e.g. a question.
            placeholder: part of the template that is replaced by the prompt.

        Returns:
            A tensor with b rows.

        Raises:
            ValueError: if the numbers of images and prompts differ, or the images have a wrong shape, an integer dtype
                or values outside [-0.1, 1.1].
        """
        check_pairs(images, prompts)
        self._check_images(images)
        texts = [
            chat_text(self.processor, template.replace(placeholder, self._escaped(prompt)), 1) for prompt in prompts
        ]
        return micro_batched(call, self.micro_batch, images.to(self.model.device), texts)

    def _escaped(self, text: str) -> str:
        return escape_special_tokens(self.processor.tokenizer, text)
