"""The type of a prompt and its validation."""

from __future__ import annotations

from collections.abc import Sequence

from longalign.errors import shorten

Prompt = str | Sequence[str]
"""A text, or a list of texts: the segments of the prompt, for the segmenter `manual`."""


def check_prompts(prompts: Sequence[Prompt], lists: bool = True) -> list[Prompt]:
    """Validates prompts and returns them as a list.

    Args:
        prompts: a sequence of prompts: texts, or lists of texts (segments).
        lists: whether a prompt may be a list of texts.

    Raises:
        ValueError: if ``prompts`` is a single text, empty or not a sequence, or if a prompt has a wrong type or is
            rejected by `check_text`. The message contains the index of the prompt.
    """
    if isinstance(prompts, str):
        raise ValueError(f"expected a sequence of prompts, got one text {prompts[:40]!r}; write [prompt]")
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise ValueError(f"expected a sequence of prompts, got {shorten(prompts)}; pass a list")
    checked = list(prompts)
    if not checked:
        raise ValueError("expected at least one prompt, got none; pass at least one")
    for i, prompt in enumerate(checked):
        parts = [prompt] if isinstance(prompt, str) else prompt if lists and isinstance(prompt, (list, tuple)) else None
        if parts is None or not all(isinstance(part, str) for part in parts):
            expected = "a text or a list of texts" if lists else "a text"
            raise ValueError(f"prompt {i} must be {expected}, got {shorten(prompt)}; correct or remove it")
        for part in parts:
            check_text(part, f"prompt {i}")
    return checked


def check_text(text: str, where: str) -> str:
    """Returns the text after checking that it can be encoded as UTF-8, as tokenizers require.

    Lone surrogates (halves of a UTF-16 pair) cannot be encoded. They are caused by bytes that are not UTF-8, or by
    broken escapes in a file.

    Args:
        text: the text.
        where: what the text is, e.g. "prompt 3"; start of the error message.

    Raises:
        ValueError: if the text contains a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} cannot be encoded as UTF-8: invalid character {text[error.start]!r} (a lone surrogate) at "
            f"position {error.start} of {shorten(text)}; save the text as UTF-8"
        ) from None
    return text


def plain_text(prompt: Prompt) -> str:
    """Returns a prompt as one text; a list of segments is joined with spaces."""
    return prompt if isinstance(prompt, str) else " ".join(prompt)
