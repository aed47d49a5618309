"""Cutting text that is longer than a window of tokens into pieces that fit, losing nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

TokenCounter = Callable[[str], int]
"""Number of tokens of a text, without special tokens."""

_CLAUSE_END = re.compile(r"""[,;:.!?…—–)\]”"]+(?=\s)|[，、；：。！？）」』】]+""")
_WORD = re.compile(r"\S+")
_NO_BLANK = re.compile(r"\S")
_JOINERS = "\u200d\ufe0e\ufe0f"


def _clause_ends(text: str, start: int, stop: int) -> Iterator[int]:
    return (match.end() for match in _CLAUSE_END.finditer(text, start, stop))


def _word_ends(text: str, start: int) -> Iterator[int]:
    return (match.end() for match in _WORD.finditer(text, start))


def _character_ends(text: str, start: int) -> Iterator[int]:
    # a combining mark or a joiner stays with the character it belongs to
    for i in range(start + 1, len(text)):
        if not unicodedata.combining(text[i]) and text[i] not in _JOINERS and text[i - 1] != "\u200d":
            yield i
    yield len(text)


def _fits(text: str, start: int, stop: int, limit: int, count: TokenCounter) -> bool:
    """Whether ``text[start:stop]`` has at most ``limit`` tokens; where it is far too long, only its beginning is
    counted."""
    size = 16 * limit + 256
    while size < stop - start:
        # a longer text may have a few tokens fewer than its beginning, where they merge into others
        if count(text[start : start + size]) > 2 * limit + 16:
            return False
        size *= 2
    return count(text[start:stop]) <= limit


def _longest(text: str, start: int, ends: Iterable[int], limit: int, count: TokenCounter) -> int:
    """The last of the ascending ``ends`` up to which ``text`` has at most ``limit`` tokens from ``start`` on; 0 if
    there is none. No more of the ends are asked for than about twice as many as fit."""
    rest, known = iter(ends), []

    def fits(i: int) -> bool:
        known.extend(islice(rest, max(0, i + 1 - len(known))))
        return i < len(known) and _fits(text, start, known[i], limit, count)

    last, step = -1, 1
    # doubling first: a long text is never counted as a whole for each of its pieces
    while fits(last + step):
        last += step
        step *= 2
    fails = min(last + step, len(known))
    while fails - last > 1:
        middle = (last + fails) // 2
        if fits(middle):
            last = middle
        else:
            fails = middle
    return known[last] if last >= 0 else 0


def pieces(text: str, limit: int, count: TokenCounter, *, clauses: bool = True) -> list[str]:
    """Cuts one text into stripped pieces of at most ``limit`` tokens, each as long as its boundary allows.

    Boundaries are ends of clauses (if ``clauses``), else of words, else of characters: the last only where one word
    alone is longer than the limit. A character with more combining marks than the limit holds is parted from some of
    them. Time and the longest text that is counted grow with the pieces, not with the square of the text.

    Raises:
        ValueError: if a single code point has more tokens than ``limit``.
    """
    if limit < 1:
        raise ValueError(f"a window needs at least 1 token, got {limit}")
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
        found = _NO_BLANK.search(text, end)
        start = found.start() if found else len(text)
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
        out += [segment] if _fits(segment, 0, len(segment), limit, count) else pieces(segment, limit, count)
    return out
