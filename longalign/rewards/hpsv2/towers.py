"""Image encoder and text encoder (towers) of an open_clip model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from longalign.rewards.towers import Towers
from longalign.tokens import NUM_SPECIAL_TOKENS

_SPECIAL = re.compile("<((?:start|end)_of_text>)")


class OpenClipTowers(Towers):
    """Image encoder and text encoder (towers) of an ``open_clip`` model.

    Args:
        model: an ``open_clip.model.CLIP``.
        tokenizer: an ``open_clip.tokenizer.SimpleTokenizer``.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dim = model.text_projection.shape[1]
        self.window = model.context_length - NUM_SPECIAL_TOKENS

    def count_tokens(self, text: str) -> int:
        # unlike calling the tokenizer, encode() does not clean the text
        return len(self.tokenizer.encode(self.tokenizer.clean_fn(self._escape_special(text))))

    def _escape_special(self, text: str) -> str:
        """Inserts a space into names of special tokens in a text, so that they are tokenized as ordinary text."""
        clean = self.tokenizer.clean_fn(text)
        return _SPECIAL.sub(r"< \1", clean) if _SPECIAL.search(clean) else text

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.model.positional_embedding.dtype))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            [self._escape_special(text) for text in texts], context_length=self.model.context_length
        )
        return self.model.encode_text(tokens.to(self.model.positional_embedding.device))
