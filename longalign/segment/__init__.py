"""Text to segments: the splitters and their configs; rows to groups of like length. Pure Python, without torch."""

from longalign.segment.fit import TokenCounter, fit
from longalign.segment.groups import CALL_COST, group_by_length
from longalign.segment.parts import (
    LongAlign,
    LongAlignConfig,
    Manual,
    ManualConfig,
    Packed,
    PackedConfig,
    Prompt,
    Segmenter,
    Sentence,
    SentenceConfig,
    Tokens,
    TokensConfig,
)
from longalign.segment.sentence import sentences

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
    "fit",
    "group_by_length",
    "sentences",
]
