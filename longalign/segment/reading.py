"""Prompts into segments for a model with a window: checked segmenters, and windows of whole sentences."""

from __future__ import annotations

import re

from longalign.segment.prompts import Prompt, check_text, plain_text
from longalign.segment.segmenters import Packed, Segmenter
from longalign.segment.windows import TokenCounter, fit

_WORD = re.compile(r"\w")


def split(segmenter: Segmenter, prompt: Prompt, count: TokenCounter, window: int | None = None) -> list[str]:
    """The segments of a prompt, each of at most ``window`` tokens.

    Args:
        segmenter: splits it.
        prompt: a checked prompt.
        count: the encoder's token counter.
        window: tokens that the encoder reads in one pass; longer segments are split further. None leaves them.

    Raises:
        ValueError: with the segmenter's name, if it returns anything but a list of texts, or no text at all for a
            prompt that has some.
    """
    found = segmenter(prompt, count)
    name = f"the segmenter '{_name(segmenter)}'"
    if not isinstance(found, (list, tuple)) or not all(isinstance(segment, str) for segment in found):
        kinds = sorted({type(segment).__name__ for segment in found}) if isinstance(found, (list, tuple)) else []
        what = f"a {type(found).__name__}" + (f" of {', '.join(kinds)}" if kinds else "")
        raise ValueError(f"{name} must return a list of texts, got {what} for the prompt {_shown(prompt)}")
    if not any(map(_WORD.search, found)) and _WORD.search(plain_text(prompt)):
        raise ValueError(f"{name} returned no text for the prompt {_shown(prompt)}; expected its segments")
    for segment in found:
        check_text(segment, f"a segment of {name}")
    return list(found) if window is None else fit(found, window, count)


def windows(text: str, window: int, count: TokenCounter) -> list[str]:
    """A text as it is where a model's window holds it, else whole sentences in as few windows as hold them in order.

    A sentence of more than ``window`` tokens is split after a clause where possible. Nothing but blanks is lost.
    """
    return [text] if count(text) <= window else fit(Packed(window)(text, count), window, count)


def _name(segmenter: Segmenter) -> str:
    part = segmenter if hasattr(segmenter, "__qualname__") else type(segmenter)
    return f"{part.__module__}.{part.__qualname__}"  # type: ignore[union-attr]


def _shown(prompt: Prompt) -> str:
    text = plain_text(prompt)
    return repr(text if len(text) <= 60 else text[:57] + "...")
