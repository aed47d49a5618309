"""Splits prompts into segments or windows that fit the text model; validates the output of segmenters."""

from __future__ import annotations

import re

from longalign.errors import shorten
from longalign.segmenters.fitting import TokenCounter, split_to_window
from longalign.segmenters.parts import Packed, Segmenter
from longalign.segmenters.prompts import Prompt, check_text, plain_text

_WORD = re.compile(r"\w")


def split(segmenter: Segmenter, prompt: Prompt, count: TokenCounter, window: int | None = None) -> list[str]:
    """Splits a prompt with a segmenter, validates the result and returns the segments.

    Args:
        segmenter: splits the prompt.
        prompt: a prompt that `check_prompts` accepted.
        count: counts the tokens of a text, without special tokens.
        window: maximum number of tokens per segment; longer segments are split further. None leaves them
            as they are.

    Raises:
        ValueError: if the segmenter does not return a list of texts, returns no word of a prompt that has words, or
            returns a text that `check_text` rejects. The message contains the segmenter's name.
    """
    segments = segmenter(prompt, count)
    name = f"the segmenter '{_name(segmenter)}'"
    if not isinstance(segments, (list, tuple)) or not all(isinstance(segment, str) for segment in segments):
        kinds = sorted({type(segment).__name__ for segment in segments}) if isinstance(segments, (list, tuple)) else []
        returned = f"a {type(segments).__name__}" + (f" of {', '.join(kinds)}" if kinds else "")
        raise ValueError(
            f"{name} must return a list of texts, got {returned} for the prompt {shorten(plain_text(prompt), 60)}; "
            "correct the segmenter"
        )
    if not any(map(_WORD.search, segments)) and _WORD.search(plain_text(prompt)):
        raise ValueError(
            f"{name} returned no text for the prompt {shorten(plain_text(prompt), 60)}; expected at least one segment: "
            "correct the segmenter or the prompt"
        )
    for segment in segments:
        check_text(segment, f"a segment of {name}")
    return list(segments) if window is None else split_to_window(segments, window, count)


def windows(text: str, window: int, count: TokenCounter) -> list[str]:
    """Splits a text, in order, into windows: texts of as many whole sentences as fit ``window`` tokens.

    A text of at most ``window`` tokens is returned unchanged, as the only window. A sentence of more than ``window``
    tokens is split after clauses where possible, otherwise between words. Only whitespace is lost. ``count`` returns
    the number of tokens of a text, without special tokens.
    """
    return [text] if count(text) <= window else split_to_window(Packed(window)(text, count), window, count)


def _name(segmenter: Segmenter) -> str:
    part = segmenter if hasattr(segmenter, "__qualname__") else type(segmenter)
    return f"{part.__module__}.{part.__qualname__}"  # type: ignore[union-attr]
