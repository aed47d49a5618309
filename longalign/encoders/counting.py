"""Counts tokens of prompts without a checkpoint."""

from __future__ import annotations

from functools import cache
from typing import Any

from longalign.tokens import NUM_SPECIAL_TOKENS


@cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def count_clip_tokens(text: str) -> int:
    """Returns the number of tokens of a text with CLIP's tokenizer, including the start and end tokens.

    CLIP's text model reads at most 77 tokens. The vocabulary is part of open_clip, so nothing is downloaded.
    """
    tokenizer = _tokenizer()
    return len(tokenizer.encode(tokenizer.clean_fn(text))) + NUM_SPECIAL_TOKENS
