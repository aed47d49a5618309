"""Splits text that exceeds a maximum number of tokens (a window) into pieces that fit. Only whitespace is lost."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

TokenCounter = Callable[[str], int]
"""A function that returns the number of tokens of a text, without special tokens."""

_CLAUSE_END = re.compile(r"""[,;:.!?…—–)\]”"]+(?=\s)|[，、；：。！？）」』】]+""")
_WORD = re.compile(r"\S+")
_NON_SPACE = re.compile(r"\S")
_JOINERS = "\u200d\ufe0e\ufe0f"


def _clause_ends(text: str, start: int, stop: int) -> Iterator[int]:
    return (match.end() for match in _CLAUSE_END.finditer(text, start, stop))


def _word_ends(text: str, start: int) -> Iterator[int]:
    return (match.end() for match in _WORD.finditer(text, start))


def _character_ends(text: str, start: int) -> Iterator[int]:
    # do not separate a combining mark or a joiner from its base character
    for i in range(start + 1, len(text)):
        if not unicodedata.combining(text[i]) and text[i] not in _JOINERS and text[i - 1] != "\u200d":
            yield i
    yield len(text)


def _fits(text: str, start: int, stop: int, limit: int, count: TokenCounter) -> bool:
    """Whether ``text[start:stop]`` has at most ``limit`` tokens.

    If the text is much too long, only its beginning is tokenized.
    """
    size = 16 * limit + 256
    while size < stop - start:
        # margin: a text may have slightly fewer tokens than its prefix, where tokens merge
        if count(text[start : start + size]) > 2 * limit + 16:
            return False
        size *= 2
    return count(text[start:stop]) <= limit


def _longest(text: str, start: int, ends: Iterable[int], limit: int, count: TokenCounter) -> int:
    """Returns the last of the ascending offsets ``ends`` such that ``text[start:end]`` has at most ``limit`` tokens.

    Returns 0 if none fits. Reads at most about twice as many of ``ends`` as fit.
    """
    remaining, known = iter(ends), []

    def fits(i: int) -> bool:
        known.extend(islice(remaining, max(0, i + 1 - len(known))))
        return i < len(known) and _fits(text, start, known[i], limit, count)

    last, step = -1, 1
    # doubling before bisection: the whole remaining text is not tokenized again for each piece
    while fits(last + step):
        last += step
        step *= 2
    too_long = min(last + step, len(known))
    while too_long - last > 1:
        middle = (last + too_long) // 2
        if fits(middle):
            last = middle
        else:
            too_long = middle
    return known[last] if last >= 0 else 0


def pieces(text: str, limit: int, count: TokenCounter, *, clauses: bool = True) -> list[str]:
    """Splits one text into stripped pieces of at most ``limit`` tokens, each as long as possible.

    A word of more than ``limit`` tokens is split between characters. A character is separated from its combining marks
    only if the character with its marks exceeds ``limit``. The time is about linear in the length of the text.

    Args:
        text: the text.
        limit: maximum number of tokens per piece, without special tokens.
        count: counts the tokens of a text. Each call receives a text of at most about the length of a piece.
        clauses: whether pieces end after a clause (at punctuation) where possible; if False, after any word.

    Raises:
        ValueError: if ``limit`` is below 1, or a single code point has more than ``limit`` tokens.
    """
    if limit < 1:
        raise ValueError(f"expected a window of at least 1 token, got {limit}; use a larger window")
    text = text.strip()
    out, start, word = [], 0, 0
    while start < len(text):
        if start >= word:
            word = next(_word_ends(text, start))
        end = _longest(text, start, chain([word], _word_ends(text, word)), limit, count)
        if clauses and 0 < end < len(text):
            end = _longest(text, start, _clause_ends(text, start, end + 1), limit, count) or end
        end = end or _longest(text, start, _character_ends(text, start), limit, count)
        end = end or _longest(text, start, range(start + 1, len(text) + 1), limit, count)
        if not end:
            raise ValueError(
                f"a window of {limit} tokens cannot hold {text[start]!r} ({count(text[start])} tokens); use a larger "
                "window"
            )
        out.append(text[start:end].rstrip())
        match = _NON_SPACE.search(text, end)
        start = match.start() if match else len(text)
    return out


def split_to_window(segments: Sequence[str], limit: int, count: TokenCounter) -> list[str]:
    """Splits segments of more than ``limit`` tokens. Shorter segments are returned unchanged.

    Args:
        segments: texts in order.
        limit: maximum number of tokens per segment, without special tokens.
        count: counts the tokens of a text.

    Returns:
        Segments of at most ``limit`` tokens, split after clauses where possible, otherwise between words.

    Raises:
        ValueError: if a segment cannot be split; see `pieces`.
    """
    out: list[str] = []
    for segment in segments:
        out += [segment] if _fits(segment, 0, len(segment), limit, count) else pieces(segment, limit, count)
    return out
