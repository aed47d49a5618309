"""Texts as tokens with their places in the text, by a transformers tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longalign.segment import windows

_REMEMBERED = 1_000_000
"""Characters and tokens together of the texts that are remembered: about 80 MB."""


@dataclass(frozen=True)
class Tokenized:
    """A text and its tokens, without special tokens.

    Attributes:
        text: the text.
        ids: token ids.
        starts: where in the text each token begins.
    """

    text: str
    ids: tuple[int, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, num_tokens: int) -> tuple[str, str]:
        """The text of the first ``num_tokens`` tokens and the text after them."""
        if num_tokens >= len(self.ids):
            return self.text, ""
        at = self.starts[num_tokens]
        return self.text[:at].rstrip(), self.text[at:]


class TextTokens:
    """A transformers tokenizer as a function from text to `Tokenized`. It remembers the texts it has seen lately.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocab_size: rows of the text model's embedding.

    Raises:
        ValueError: if the tokenizer is a slow one, or has ids that the text model has no embedding for.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed")
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= vocab_size:
            raise ValueError(
                f"the tokenizer ends a text with id {tokenizer.eos_token_id}, the text model has {vocab_size} "
                "embeddings; they do not belong together, load both from one checkpoint"
            )
        self.tokenizer = tokenizer
        self._seen: dict[str, Tokenized] = {}
        self._size = 0
        self._special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))

    def __call__(self, text: str) -> Tokenized:
        return self.batch([text])[0]

    def count(self, text: str) -> int:
        """Number of tokens of a text; the token counter that segmenters take."""
        return len(self(text))

    def batch(self, texts: Sequence[str]) -> list[Tokenized]:
        """Tokens of several texts in one call of the tokenizer."""
        found = {text: self._seen[text] for text in texts if text in self._seen}
        new = list(dict.fromkeys(text for text in texts if text not in found))
        if new:
            for text, (ids, starts) in zip(new, self._read(new), strict=True):
                found[text] = Tokenized(text, tuple(ids), tuple(starts))
                self._remember(found[text])
        return [found[text] for text in texts]

    def _read(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids and starts. What looks like a special token is text: a prompt cannot end itself with ``</s>``."""
        read = self._call(texts)
        controls = [i for i, found in enumerate(zip(texts, *read, strict=True)) if self._controls(*found)]
        out = [(ids, [start for start, _ in offsets]) for ids, offsets in zip(*read, strict=True)]
        for i in controls:
            ((ids,), (offsets,)) = self._call([texts[i]], split_special_tokens=True)
            starts = [start for start, _ in offsets]
            # a unigram model has special tokens among its pieces, too
            for place in reversed(self._controls(texts[i], ids, offsets)):
                start, stop = offsets[place]
                parts = self._read([texts[i][start : start + 1], texts[i][start + 1 : stop]])
                ids[place : place + 1] = [*parts[0][0], *parts[1][0]]
                starts[place : place + 1] = [start] * len(parts[0][0]) + [start + 1 + at for at in parts[1][1]]
            out[i] = (ids, starts)
        return out

    def _call(self, texts: Sequence[str], **settings: Any) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        read = self.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False,
            **settings,
        )  # fmt: skip
        return read["input_ids"], read["offset_mapping"]

    def _controls(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
        """Where ids are special tokens that are written out in the text. Those of one character, such as the ``!`` with
        which some CLIPs are padded, are text in any case."""
        places = enumerate(zip(ids, offsets, strict=True))
        return [i for i, (of, (a, b)) in places if of in self._special and b - a > 1 and text[a:b] == self._special[of]]

    def in_passes(self, texts: Sequence[str], window: int | None) -> list[list[Tokenized]]:
        """Each text, or the windows of at most so many tokens in which it is read; see `longalign.segment.windows`."""
        whole = self.batch(texts)
        if window is None:
            return [[text] for text in whole]
        return [[text] if len(text) <= window else self.batch(windows(text.text, window, self.count)) for text in whole]

    def _remember(self, read: Tokenized) -> None:
        size = len(read.text) + len(read)
        if self._size + size > _REMEMBERED:
            self._seen.clear()
            self._size = 0
        if size <= _REMEMBERED:
            self._seen[read.text] = read
            self._size += size
