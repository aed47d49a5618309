"""Text to segments: the splitters and their configs; rows to groups of like length. Pure Python, without torch."""

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
from longalign.segment.windows import TokenCounter, fit

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
    "fit",
    "group_by_length",
    "plain_text",
    "sentences",
    "split",
    "windows",
]
