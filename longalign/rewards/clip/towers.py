"""Image encoder and text encoder (towers) of transformers' ``CLIPModel``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longalign.functional.images import ImagePreprocessor
from longalign.rewards.pretrained import projected_features
from longalign.rewards.towers import Towers
from longalign.tokens import NUM_SPECIAL_TOKENS, TextTokens


class ClipTowers(Towers):
    """Image encoder and text encoder (towers) of a ``transformers.CLIPModel``.

    The text encoder is causal, and its embedding is the state of the end token ``<eot>``. Padding after ``<eot>``
    therefore has no effect, and no mask is used.

    Args:
        model: a ``CLIPModel``.
        tokenizer: the transformers tokenizer of the model.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = TextTokens(tokenizer, model.config.text_config.vocab_size)
        self.dim = model.config.projection_dim
        self.window = model.config.text_config.max_position_embeddings - NUM_SPECIAL_TOKENS

    def count_tokens(self, text: str) -> int:
        return self.tokens.count(text)

    def num_positions(self, texts: Sequence[str]) -> list[int]:
        return [min(len(tokens), self.window) + NUM_SPECIAL_TOKENS for tokens in self.tokens.batch(texts)]

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return projected_features(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        sot, eot = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [[sot, *tokens.ids[: self.window], eot] for tokens in self.tokens.batch(texts)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.tokens.pad_id] * (length - len(row)) for row in rows])
        return projected_features(self.model.get_text_features(input_ids=ids.to(self.model.device)))

    def train_only(self, which: str) -> None:
        text = (self.model.text_model, self.model.text_projection)
        vision = (self.model.vision_model, self.model.visual_projection)
        parts = {"all": (*text, *vision), "text": text, "vision": vision, "projections": (text[1], vision[1])}
        self.requires_grad_(False)
        for part in (*parts[which], self.logit_scale):
            part.requires_grad_(True)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    def enable_gradient_checkpointing(self) -> None:
        # newer versions of transformers renamed this method, and the old name warns
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})

    def save(self, folder: Path, preprocessor: ImagePreprocessor) -> None:
        self.model.save_pretrained(folder)
        # reset, otherwise the truncation and padding of the last call are saved
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.no_truncation()
            backend.no_padding()
        self.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            json.dumps(_image_processor_config(preprocessor), indent=1) + "\n"
        )


def _image_processor_config(preprocessor: ImagePreprocessor) -> dict[str, Any]:
    """Returns the config of transformers' ``CLIPImageProcessor`` with the settings of ``preprocessor``."""
    height, width = preprocessor.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessor.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessor.mean),
        "image_std": list(preprocessor.std),
    }
