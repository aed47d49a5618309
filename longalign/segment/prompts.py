"""What a prompt may be, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence

Prompt = str | Sequence[str]
"""A text, or a list of texts that are its segments (understood by the segmenter ``manual``)."""


def check_prompts(prompts: Sequence[Prompt], lists: bool = True) -> list[Prompt]:
    """The prompts as a list; each is a text, or a list of texts that are its segments.

    Args:
        prompts: what was given.
        lists: whether a prompt may be a list of texts.

    Raises:
        ValueError: for one text instead of a sequence, an empty sequence, a prompt that is neither, or one that
            `check_text` rejects. The prompt is named by its place.
    """
    if isinstance(prompts, str):
        raise ValueError(f"expected a sequence of prompts, got one text {prompts[:40]!r}; write [prompt]")
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise ValueError(f"expected a sequence of prompts, got {_shown(prompts)}")
    checked = list(prompts)
    if not checked:
        raise ValueError("expected at least one prompt, got none")
    for i, prompt in enumerate(checked):
        parts = [prompt] if isinstance(prompt, str) else prompt if lists and isinstance(prompt, (list, tuple)) else None
        if parts is None or not all(isinstance(part, str) for part in parts):
            expected = "a text or a list of texts" if lists else "a text"
            raise ValueError(f"prompt {i} must be {expected}, got {_shown(prompt)}")
        for part in parts:
            check_text(part, f"prompt {i}")
    return checked


def check_text(text: str, where: str) -> str:
    """The text. Raises ValueError, with ``where`` in its message, if it holds half a surrogate pair: a byte that was
    not UTF-8, or a broken escape in a file. No tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is not valid text: character {error.start} of {_shown(text)}, {text[error.start]!r}, is half of "
            "a surrogate pair, or a byte that is not UTF-8; write the text as UTF-8"
        ) from None
    return text


def plain_text(prompt: Prompt) -> str:
    """A prompt as one text; given segments are joined with blanks."""
    return prompt if isinstance(prompt, str) else " ".join(prompt)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
