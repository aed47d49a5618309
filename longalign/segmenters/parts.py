"""The segmenters and their configs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from pydantic import Field

from longalign.registry import PartConfig
from longalign.runtime import Runtime
from longalign.segmenters.fitting import TokenCounter, pieces
from longalign.segmenters.prompts import Prompt, check_prompts
from longalign.segmenters.sentence import sentences


class Segmenter(Protocol):
    """A callable that splits a prompt into segments: texts, in order, that an encoder encodes separately.

    It is called as ``segmenter(prompt, count)`` and returns a list of texts. ``prompt`` is a text or a list of texts;
    ``count`` returns the number of tokens of a text for the encoder, without special tokens. Functions with these two
    arguments can be registered as segmenters.
    """

    def __call__(self, prompt: Prompt, count: TokenCounter, /) -> list[str]: ...


def _text(prompt: Prompt, name: str) -> str:
    if isinstance(prompt, str):
        return prompt
    raise ValueError(
        f"the segmenter '{name}' expects a text, got a {type(prompt).__name__}; "
        "pass a text, or use the segmenter 'manual' for lists of segments"
    )


class SegmenterConfig(PartConfig):
    """Base class of segmenter configs: selects a segmenter and its settings."""


@dataclass(frozen=True)
class Sentence:
    """Segmenter that splits a text into sentences; see `longalign.segmenters.sentences`.

    Raises:
        ValueError: when called with a prompt that is not a single text.
    """

    @classmethod
    def from_config(cls, config: SentenceConfig, runtime: Runtime) -> Sentence:
        return cls()

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        return sentences(_text(prompt, "sentence"))


class SentenceConfig(SegmenterConfig):
    """Splits prompts into sentences."""

    target: ClassVar[str] = "longalign.segmenters.parts:Sentence"

    name: Literal["sentence"] = "sentence"


_PUBLISHED = re.compile(r'"!|\.|\?|;"')


@dataclass(frozen=True)
class LongAlign:
    """Segmenter that splits a text exactly as the published LongAlign models do, to reproduce published numbers.

    A text is split at every ``.`` and ``?``, at ``!`` after a double quote and at ``;`` before a double quote.
    These marks and quotes are dropped, and ``.`` is appended to each non-empty piece, e.g. ``'One. Two. '`` becomes
    ``['One.', ' Two.', ' .']``. Decimal numbers are split too.

    Raises:
        ValueError: when called with a prompt that is not a single text.
    """

    @classmethod
    def from_config(cls, config: LongAlignConfig, runtime: Runtime) -> LongAlign:
        return cls()

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        return [piece + "." for piece in _PUBLISHED.split(_text(prompt, "longalign")) if piece]


class LongAlignConfig(SegmenterConfig):
    """Splits prompts exactly as the published LongAlign models do."""

    target: ClassVar[str] = "longalign.segmenters.parts:LongAlign"

    name: Literal["longalign"] = "longalign"


@dataclass(frozen=True)
class Tokens:
    """Segmenter that splits a text into windows of as many whole words as fit ``n`` tokens, ignoring sentences.

    A word of more than ``n`` tokens is split.

    Attributes:
        n: maximum number of tokens per window, without special tokens.

    Raises:
        ValueError: when called with a prompt that is not a single text.
    """

    n: int

    @classmethod
    def from_config(cls, config: TokensConfig, runtime: Runtime) -> Tokens:
        return cls(config.n)

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        return pieces(_text(prompt, "tokens"), self.n, count, clauses=False)


class TokensConfig(SegmenterConfig):
    """Splits prompts into windows of as many whole words as fit ``n`` tokens, ignoring sentences."""

    target: ClassVar[str] = "longalign.segmenters.parts:Tokens"

    name: Literal["tokens"] = "tokens"
    n: int = Field(default=75, ge=1)
    """maximum number of tokens per window, without special tokens; 75 is the maximum that CLIP reads at once."""


@dataclass(frozen=True)
class Packed:
    """Segmenter that packs the whole sentences of a text, in order, into segments of at most ``n`` tokens.

    A sentence of more than ``n`` tokens is not split and becomes one segment.

    Attributes:
        n: maximum number of tokens per segment, without special tokens.

    Raises:
        ValueError: when called with a prompt that is not a single text.
    """

    n: int

    @classmethod
    def from_config(cls, config: PackedConfig, runtime: Runtime) -> Packed:
        return cls(config.n)

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        out: list[str] = []
        for sentence in sentences(_text(prompt, "packed")):
            joined = f"{out[-1]} {sentence}" if out else sentence
            if out and count(joined) <= self.n:
                out[-1] = joined
            else:
                out.append(sentence)
        return out


class PackedConfig(SegmenterConfig):
    """Splits prompts into groups of as many whole sentences as fit ``n`` tokens.

    A sentence of more than ``n`` tokens is a group by itself.
    """

    target: ClassVar[str] = "longalign.segmenters.parts:Packed"

    name: Literal["packed"] = "packed"
    n: int = Field(default=40, ge=1)
    """maximum number of tokens per group, without special tokens. 75 tokens fill CLIP's window; 40 were best in
    docs/studies/segments.md, about the length of the captions that the model was pre-trained on.
    """


@dataclass(frozen=True)
class Manual:
    """Segmenter that returns segments given by the user: a list of texts, or one text with ``marker`` between segments.

    The segments are stripped, and empty ones are dropped. Encoders of the whole prompt, such as T5, join a list with
    spaces, but encode a marker in a text as a word; for them, write the prompt as a list.

    Attributes:
        marker: word that separates segments in a text, case-sensitive.

    Raises:
        ValueError: when called with a prompt that is neither a text nor a list of texts.
    """

    marker: str

    @classmethod
    def from_config(cls, config: ManualConfig, runtime: Runtime) -> Manual:
        return cls(config.marker)

    def __call__(self, prompt: Prompt, count: TokenCounter) -> list[str]:
        (segments,) = check_prompts([prompt])
        if isinstance(prompt, str):
            left = r"(?<!\w)" if self.marker[0].isalnum() else ""
            right = r"(?!\w)" if self.marker[-1].isalnum() else ""
            segments = re.split(left + re.escape(self.marker) + right, prompt)
        return [segment.strip() for segment in segments if segment.strip()]


class ManualConfig(SegmenterConfig):
    """Uses segments given by the user: a list of texts, or a text with ``marker`` between segments."""

    target: ClassVar[str] = "longalign.segmenters.parts:Manual"

    name: Literal["manual"] = "manual"
    marker: str = Field(default="BREAK", min_length=1)
    """word that separates segments in a text, case-sensitive."""
