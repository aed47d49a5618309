"""The segmenters, each with its config beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field

from longalign.registry import PartConfig
from longalign.runtime import Runtime
from longalign.segment.prompts import Prompt, check_prompts
from longalign.segment.sentence import sentences
from longalign.segment.windows import TokenCounter, pieces


class Segmenter(Protocol):
    """Splits a prompt into segments, in order. A plain function of this form can be registered as a segmenter."""

    def __call__(self, prompt: Prompt, count: TokenCounter, /) -> list[str]: ...


def _text(prompt: Prompt, name: str) -> str:
    if isinstance(prompt, str):
        return prompt
    raise ValueError(
        f"the segmenter '{name}' splits a text and got a {type(prompt).__name__}; "
        f"to give segments as a list use the segmenter 'manual'"
    )


@dataclass(frozen=True)
class Sentence:
    """One segment per sentence; see `sentences`."""

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        return sentences(_text(prompt, "sentence"))


class SentenceConfig(PartConfig):
    """Segments are sentences."""

    name: Literal["sentence"] = "sentence"

    def build(self, runtime: Runtime) -> Sentence:
        return Sentence()


_PUBLISHED = re.compile(r'"!|\.|\?|;"')


@dataclass(frozen=True)
class LongAlign:
    """The splitter of the published LongAlign models, faults included.

    It splits at every ``.`` and ``?``, at ``!`` only after and at ``;`` only before a double quote, and gives each
    piece that is not empty a ``.`` back: ``'One. Two. '`` gives ``['One.', ' Two.', ' .']``. Decimals are split and
    what it split at is lost. Use it to reproduce published numbers.
    """

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        return [piece + "." for piece in _PUBLISHED.split(_text(prompt, "longalign")) if piece]


class LongAlignConfig(PartConfig):
    """Segments as in the published LongAlign models."""

    name: Literal["longalign"] = "longalign"

    def build(self, runtime: Runtime) -> LongAlign:
        return LongAlign()


@dataclass(frozen=True)
class Tokens:
    """Windows of ``n`` tokens regardless of sentences: as many whole words as fit, a longer word in pieces."""

    n: int = 75

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        return pieces(_text(prompt, "tokens"), self.n, count, clauses=False)


class TokensConfig(PartConfig):
    """Segments are windows of tokens.

    Attributes:
        n: tokens in a window, without special tokens; 75 fill CLIP's window.
    """

    name: Literal["tokens"] = "tokens"
    n: int = Field(75, ge=1)

    def build(self, runtime: Runtime) -> Tokens:
        return Tokens(self.n)


@dataclass(frozen=True)
class Packed:
    """Whole sentences packed, in order, into segments of at most ``n`` tokens.

    A sentence that is longer than ``n`` stays whole, a segment of its own.
    """

    n: int = 75

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        out: list[str] = []
        for sentence in sentences(_text(prompt, "packed")):
            joined = f"{out[-1]} {sentence}" if out else sentence
            if out and count(joined) <= self.n:
                out[-1] = joined
            else:
                out.append(sentence)
        return out


class PackedConfig(PartConfig):
    """Segments are groups of whole sentences.

    Attributes:
        n: most tokens in a segment, without special tokens; 75 fill CLIP's window.
    """

    name: Literal["packed"] = "packed"
    n: int = Field(75, ge=1)

    def build(self, runtime: Runtime) -> Packed:
        return Packed(self.n)


@dataclass(frozen=True)
class Manual:
    """Segments as the user gives them: a list of texts, or one text with a marker between segments.

    Encoders that read the whole text join a list with blanks, but read the marker as a word; beside them use lists.
    """

    marker: str = "BREAK"

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        (given,) = check_prompts([prompt])
        if isinstance(prompt, str):
            left = r"(?<!\w)" if self.marker[0].isalnum() else ""
            right = r"(?!\w)" if self.marker[-1].isalnum() else ""
            given = re.split(left + re.escape(self.marker) + right, prompt)
        return [segment.strip() for segment in given if segment.strip()]


class ManualConfig(PartConfig):
    """Segments are given by the user.

    Attributes:
        marker: the word that separates segments in a text; upper and lower case differ.
    """

    name: Literal["manual"] = "manual"
    marker: str = Field("BREAK", min_length=1)

    def build(self, runtime: Runtime) -> Manual:
        return Manual(self.marker)
