"""HPSv3 (Ma et al. 2025, arXiv 2508.03789), with gradient with respect to the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longalign.files.weights import load_tensors
from longalign.functional.images import at_least_float32
from longalign.rewards.base import Scores
from longalign.rewards.hpsv3.config import PLACEHOLDER, REWARD_TOKEN, Hpsv3Config
from longalign.rewards.hpsv3.weights import find_weights, load_networks
from longalign.rewards.vlm import VisionLanguageReward
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.vlm.local import load_processor
from longalign.vlm.pixels import check_differentiable, model_inputs

#: number of pixels that images are resized to, up to rounding of their sides to multiples of 28: 256 image tokens
PIXELS = 256 * 28 * 28


class Hpsv3Reward(VisionLanguageReward):
    """Score of HPSv3: the mean preference that a head predicts from a state of Qwen2-VL, an unbounded number.

    The state is the last hidden state at the token ``<|Reward|>`` of the instruction. As in the authors' code, the
    positions of all tokens are their indices; Qwen2-VL itself gives image tokens the position of their row and column.
    `Scores.parts` contain the predicted standard deviation of the preference as ``sigma``.

    Args:
        model: a transformers ``Qwen2VLModel``.
        head: maps states ``(b, d)`` to mean and logarithm of the standard deviation, ``(b, 2)``.
        processor: the model's processor, from `prepare_processor`.
        template: the instruction, with ``{text_prompt}`` for the prompt and then ``<|Reward|>``.
        micro_batch: number of images per pass of the model; None: all at once.
    """

    def __init__(self, model: Any, head: nn.Module, processor: Any, *, template: str, micro_batch: int | None):
        super().__init__(model, processor, micro_batch)
        self.head, self.template = head.requires_grad_(False).eval(), template
        self.token = processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        num_embeddings = model.config.get_text_config().vocab_size
        if self.token >= num_embeddings:
            raise ValueError(
                f"{REWARD_TOKEN} is token {self.token} of the tokenizer, but the weights have only {num_embeddings} "
                "embeddings; set `base` to the model that they were trained from"
            )

    @classmethod
    def from_config(cls, config: Hpsv3Config, runtime: Runtime) -> Hpsv3Reward:
        """Loads the weights, and config and processor of the base model, from the Hub or local folders.

        Raises:
            ValueError: if weights are missing or unexpected, or gradient cannot pass through the image processor.
            OSError: if the instruction's file cannot be read.
        """
        from transformers import AutoConfig

        template = config.template()
        processor = prepare_processor(load_processor(config.base, None))
        check_differentiable(processor, config.base)
        base = AutoConfig.from_pretrained(resolve_checkpoint(config.base), trust_remote_code=False)
        file = find_weights(config.checkpoint, config.revision)
        model, head = load_networks(load_tensors(file), base, file, runtime.with_dtype(config.dtype))
        return cls(model, head, processor, template=template, micro_batch=config.micro_batch)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        mean, log_sigma = self.predict(self._mean_and_log_sigma, images, prompts, self.template, PLACEHOLDER).unbind(1)
        return Scores(mean, {"sigma": log_sigma.detach().exp()}).checked(images, prompts)

    def _mean_and_log_sigma(self, images: Tensor, texts: list[str]) -> Tensor:
        """Returns mean and logarithm of the standard deviation of the preference, ``(b, 2)``."""
        model = self.model
        inputs = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for key, value in model_inputs(self.processor, texts, images).items()
        }
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        states = model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return self.head(at_least_float32(states[ids == self.token]))


def prepare_processor(processor: Any) -> Any:
    """Changes the processor of the base model to that of HPSv3, in place, and returns it.

    Adds the special token ``<|Reward|>``, pads texts on the right, and resizes images to 256 image tokens.
    """
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    tokenizer.padding_side = "right"  # with it, positions are indices
    image_processor.size = type(image_processor.size)(shortest_edge=PIXELS, longest_edge=PIXELS)
    for key in ("min_pixels", "max_pixels"):  # transformers 4
        if hasattr(image_processor, key):
            setattr(image_processor, key, PIXELS)
    return processor
