"""Text to segments: the splitters and their configs. Pure Python; importing this package does not import torch."""

from longalign.segment.fit import TokenCounter, fit
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
    "sentences",
]
