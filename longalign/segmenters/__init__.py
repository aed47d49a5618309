"""Segmenters, which split a prompt into texts to encode separately, and their configs. Does not import torch."""

from longalign.segmenters.fitting import TokenCounter, split_to_window
from longalign.segmenters.parts import (
    LongAlign,
    LongAlignConfig,
    Manual,
    ManualConfig,
    Packed,
    PackedConfig,
    Segmenter,
    SegmenterConfig,
    Sentence,
    SentenceConfig,
    Tokens,
    TokensConfig,
)
from longalign.segmenters.prompts import Prompt, check_prompts, check_text, plain_text
from longalign.segmenters.sentence import sentences
from longalign.segmenters.splitting import split, windows

__all__ = [
    "LongAlign",
    "LongAlignConfig",
    "Manual",
    "ManualConfig",
    "Packed",
    "PackedConfig",
    "Prompt",
    "Segmenter",
    "SegmenterConfig",
    "Sentence",
    "SentenceConfig",
    "TokenCounter",
    "Tokens",
    "TokensConfig",
    "check_prompts",
    "check_text",
    "plain_text",
    "sentences",
    "split",
    "split_to_window",
    "windows",
]
