"""SigLIP's towers from transformers, with the interface of `longalign.rewards.Towers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longalign.rewards import Towers, projected_features
from torch import Tensor


class SiglipTowers(Towers):
    """Both towers of a ``transformers.SiglipModel``.

    Every text is padded to the whole window and encoded without a mask, as in SigLIP's training. Its text embedding is
    read at the last position, so it depends on the input length.

    Args:
        model: a ``SiglipModel``.
        tokenizer: the tokenizer of the model.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dim = model.config.text_config.projection_size
        self.length = model.config.text_config.max_position_embeddings
        self.window = self.length - tokenizer.num_special_tokens_to_add()

    def count_tokens(self, text: str) -> int:
        return len(
            self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        )

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return projected_features(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
            split_special_tokens=True,
        )
        return projected_features(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.model.device)))
