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
    """Returns the number of tokens of a text with CLIP's tokenizer, start and end of text included.

    CLIP's text model reads 77 of them. The vocabulary is the one that open_clip contains, so nothing is downloaded.
    """
    tokenizer = _tokenizer()
    return len(tokenizer.encode(tokenizer.clean_fn(text))) + NUM_SPECIAL_TOKENS
