"""Cutting text that is longer than a window of tokens into pieces that fit, losing nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

TokenCounter = Callable[[str], int]
"""Number of tokens of a text, without special tokens."""

_CLAUSE_END = re.compile(r"""[,;:.!?…—–)\]”"]+(?=\s)|[，、；：。！？）」』】]+""")
_WORD_END = re.compile(r"(?<=\S)(?=\s|$)")
_JOINERS = "\u200d\ufe0e\ufe0f"


def _clause_ends(text: str) -> list[int]:
    return [match.end() for match in _CLAUSE_END.finditer(text)]


def _word_ends(text: str) -> list[int]:
    return [match.end() for match in _WORD_END.finditer(text)]


def _character_ends(text: str) -> list[int]:
    # a combining mark or a joiner stays with the character it belongs to
    def starts(i: int) -> bool:
        return not unicodedata.combining(text[i]) and text[i] not in _JOINERS and text[i - 1] != "\u200d"

    return [i for i in range(1, len(text)) if starts(i)] + [len(text)]


def _longest(text: str, ends: Sequence[int], limit: int, count: TokenCounter) -> int:
    """The last of the ascending ``ends`` up to which ``text`` has at most ``limit`` tokens; 0 if there is none."""
    fits, fails = -1, len(ends)
    step = 1
    # doubling first: a long text is never counted as a whole for each of its pieces
    while fits + step < fails:
        if count(text[: ends[fits + step]]) <= limit:
            fits += step
            step *= 2
        else:
            fails = fits + step
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if count(text[: ends[middle]]) <= limit:
            fits = middle
        else:
            fails = middle
    return ends[fits] if fits >= 0 else 0


def pieces(text: str, limit: int, count: TokenCounter, *, clauses: bool = True) -> list[str]:
    """Cuts one text into stripped pieces of at most ``limit`` tokens, each as long as its boundary allows.

    Boundaries are ends of clauses (if ``clauses``), else of words, else of characters: the last only where one word
    alone is longer than the limit.

    Raises:
        ValueError: if a single character has more tokens than ``limit``.
    """
    if limit < 1:
        raise ValueError(f"a window needs at least 1 token, got {limit}")
    out, rest = [], text.strip()
    while rest:
        end = _longest(rest, _word_ends(rest), limit, count)
        if clauses and 0 < end < len(rest):
            end = _longest(rest[:end], _clause_ends(rest[: end + 1]), limit, count) or end
        end = end or _longest(rest, _character_ends(rest), limit, count)
        if not end:
            raise ValueError(
                f"a window of {limit} tokens cannot hold {rest[0]!r} ({count(rest[0])} tokens); use a larger window"
            )
        out.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return out


def fit(segments: Sequence[str], limit: int, count: TokenCounter) -> list[str]:
    """Splits those segments that have more than ``limit`` tokens; the others are returned untouched.

    Args:
        segments: texts in order.
        limit: tokens that the encoder's window holds, without special tokens.
        count: the encoder's token counter.

    Returns:
        Segments of at most ``limit`` tokens; a long one was split after a clause where possible, else between words.
    """
    out: list[str] = []
    for segment in segments:
        out += [segment] if count(segment) <= limit else pieces(segment, limit, count)
    return out
