"""SigLIP's image and text towers from transformers, with the interface of `longalign.rewards.Towers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from longalign.rewards import Towers, projected_features
from torch import Tensor

from longalign_siglip.naflex import patchify


class SiglipTowers(Towers):
    """Image and text tower of a ``transformers.SiglipModel``.

    Every text is padded on the right to the maximum length and encoded without a mask, as in SigLIP's training, since
    the text embedding is read at the last position. Texts are converted to lower case, as in training; SigLIP 2's
    tokenizer does not do this itself.

    Args:
        model: a ``SiglipModel``.
        tokenizer: the tokenizer of the model.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "right"
        self.dim = model.config.text_config.projection_size
        self.length = model.config.text_config.max_position_embeddings
        self.window = self.length - tokenizer.num_special_tokens_to_add()

    def count_tokens(self, text: str) -> int:
        return len(
            self.tokenizer(text.lower(), add_special_tokens=False, verbose=False, split_special_tokens=True)[
                "input_ids"
            ]
        )

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return projected_features(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            [text.lower() for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
            split_special_tokens=True,
        )
        return projected_features(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.model.device)))


class NaflexTowers(SiglipTowers):
    """Image and text tower of a ``transformers.Siglip2Model``, for images of any whole number of patches."""

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        size = self.model.config.vision_config.patch_size
        patches = patchify(pixels.to(self.model.dtype), size)
        shape = torch.tensor([pixels.shape[2] // size, pixels.shape[3] // size], device=pixels.device)
        # all images of a batch have the same size, so no patch is padding
        return projected_features(
            self.model.get_image_features(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
                spatial_shapes=shape.expand(len(patches), 2),
            )
        )
