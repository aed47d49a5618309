"""Segmenters and their configs, and grouping of rows by length. Pure Python, without torch."""

from longalign.segment.groups import CALL_COST, group_by_length
from longalign.segment.prompts import Prompt, check_prompts, check_text, plain_text
from longalign.segment.reading import split, windows
from longalign.segment.segmenters import (
    LongAlign,
    LongAlignConfig,
    Manual,
    ManualConfig,
    Packed,
    PackedConfig,
    Segmenter,
    Sentence,
    SentenceConfig,
    Tokens,
    TokensConfig,
)
from longalign.segment.sentence import sentences
from longalign.segment.windows import TokenCounter, split_to_window

__all__ = [
    "CALL_COST",
    "LongAlign",
    "LongAlignConfig",
    "Manual",
    "ManualConfig",
    "Packed",
    "PackedConfig",
    "Prompt",
    "Segmenter",
    "Sentence",
    "SentenceConfig",
    "TokenCounter",
    "Tokens",
    "TokensConfig",
    "check_prompts",
    "check_text",
    "group_by_length",
    "plain_text",
    "sentences",
    "split",
    "split_to_window",
    "windows",
]
