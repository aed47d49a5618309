"""Tokenization with character offsets, using a transformers tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longalign.segmenters import windows

NUM_SPECIAL_TOKENS = 2
"""Number of special tokens that CLIP adds to a text: start and end of text."""
_CACHE_SIZE = 1_000_000
"""Maximum size of the cache of tokenized texts, in characters plus tokens: about 80 MB."""


@dataclass(frozen=True)
class Tokenized:
    """A text and its tokens, without special tokens.

    Attributes:
        text: the text.
        ids: token ids.
        starts: offset of the first character of each token in the text.
    """

    text: str
    ids: tuple[int, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def split_at(self, num_tokens: int) -> tuple[str, str]:
        """Returns the text of the first ``num_tokens`` tokens, without trailing spaces, and the remaining text."""
        if num_tokens >= len(self.ids):
            return self.text, ""
        offset = self.starts[num_tokens]
        return self.text[:offset].rstrip(), self.text[offset:]


class TextTokens:
    """Maps texts to `Tokenized` with a transformers tokenizer and caches recent texts.

    Args:
        tokenizer: a fast transformers tokenizer with an end-of-text token.
        vocab_size: number of token ids of the text model: the rows of its embedding table.

    Raises:
        ValueError: if the tokenizer is not a fast one, or has no end-of-text id below ``vocab_size``.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        if not tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer (tokenizer.json), got a slow one: {type(tokenizer).__name__}; load it with "
                "use_fast=True, or add tokenizer.json to the folder"
            )
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= vocab_size:
            raise ValueError(
                f"the tokenizer does not match the text model: expected an eos_token_id below vocab_size, got "
                f"eos_token_id={tokenizer.eos_token_id}, vocab_size={vocab_size}; load both from one checkpoint"
            )
        self.tokenizer = tokenizer
        self._cache: dict[str, Tokenized] = {}
        self._cache_size = 0
        self._special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))

    @property
    def pad_id(self) -> int:
        """Id of the padding token; that of the end-of-text token if the tokenizer has no padding token."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def __call__(self, text: str) -> Tokenized:
        return self.batch([text])[0]

    def count(self, text: str) -> int:
        """Returns the number of tokens of a text, without special tokens. Segmenters can use it as token counter."""
        return len(self(text))

    def batch(self, texts: Sequence[str]) -> list[Tokenized]:
        """Returns one `Tokenized` per text. Texts that are not cached are tokenized in one call of the tokenizer."""
        tokenized = {text: self._cache[text] for text in texts if text in self._cache}
        new = list(dict.fromkeys(text for text in texts if text not in tokenized))
        if new:
            for text, (ids, starts) in zip(new, self._tokenize(new), strict=True):
                tokenized[text] = Tokenized(text, tuple(ids), tuple(starts))
                self._add_to_cache(tokenized[text])
        return [tokenized[text] for text in texts]

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Returns token ids and character offsets of each text.

        Special tokens that are written out in a text, such as ``</s>``, are tokenized as text.
        """
        all_ids, all_offsets = self._call(texts)
        rows = list(zip(texts, all_ids, all_offsets, strict=True))
        out = [(ids, [start for start, _ in offsets]) for _, ids, offsets in rows]
        for i in [i for i, row in enumerate(rows) if self._special_positions(*row)]:
            ((ids,), (offsets,)) = self._call([texts[i]], split_special_tokens=True)
            starts = [start for start, _ in offsets]
            # the vocabulary of a unigram model also contains special tokens
            for position in reversed(self._special_positions(texts[i], ids, offsets)):
                start, stop = offsets[position]
                head, tail = self._tokenize([texts[i][start : start + 1], texts[i][start + 1 : stop]])
                ids[position : position + 1] = [*head[0], *tail[0]]
                starts[position : position + 1] = [start] * len(head[0]) + [start + 1 + offset for offset in tail[1]]
            out[i] = (ids, starts)
        return out

    def _call(self, texts: Sequence[str], **settings: Any) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        encoding = self.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False,
            **settings,
        )  # fmt: skip
        return encoding["input_ids"], encoding["offset_mapping"]

    def _special_positions(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
        """Returns the indices in ``ids`` of special tokens that are written out in the text.

        Special tokens of one character, such as ``!``, the padding token of some CLIP models, are treated as text.
        """
        return [
            i
            for i, (token, (start, stop)) in enumerate(zip(ids, offsets, strict=True))
            if token in self._special and stop - start > 1 and text[start:stop] == self._special[token]
        ]

    def split_into_passes(self, texts: Sequence[str], window: int | None) -> list[list[Tokenized]]:
        """Splits each text into pieces that fit into one forward pass of the text model.

        Pieces end at clause or word boundaries where possible; see `longalign.segmenters.fitting`.

        Args:
            texts: the texts.
            window: maximum number of tokens of a piece, without special tokens. None disables splitting.

        Returns:
            For each text the list of its pieces, in order.
        """
        whole = self.batch(texts)
        if window is None:
            return [[text] for text in whole]
        return [[text] if len(text) <= window else self.batch(windows(text.text, window, self.count)) for text in whole]

    def _add_to_cache(self, tokenized: Tokenized) -> None:
        size = len(tokenized.text) + len(tokenized)
        if self._cache_size + size > _CACHE_SIZE:
            self._cache.clear()
            self._cache_size = 0
        if size <= _CACHE_SIZE:
            self._cache[tokenized.text] = tokenized
            self._cache_size += size
