"""Text encoders, which turn prompts into the `Conditioning` of a denoiser.

Names are loaded on first use, so ``import longalign.encoders`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.encoders.adapter import Adapter as Adapter
    from longalign.encoders.base import Conditioning as Conditioning
    from longalign.encoders.base import Encoder as Encoder
    from longalign.encoders.base import PromptReport as PromptReport
    from longalign.encoders.base import TruncationWarning as TruncationWarning
    from longalign.encoders.clip.config import ClipSegmentConfig as ClipSegmentConfig
    from longalign.encoders.clip.config import ClipSegmentSD3Config as ClipSegmentSD3Config
    from longalign.encoders.clip.config import ClipSegmentSDXLConfig as ClipSegmentSDXLConfig
    from longalign.encoders.clip.config import ClipTruncateConfig as ClipTruncateConfig
    from longalign.encoders.clip.config import LongClipConfig as LongClipConfig
    from longalign.encoders.clip.config import T5FluxConfig as T5FluxConfig
    from longalign.encoders.clip.flux import T5FluxEncoder as T5FluxEncoder
    from longalign.encoders.clip.longclip import LongClipEncoder as LongClipEncoder
    from longalign.encoders.clip.sd3 import ClipSegmentSD3Encoder as ClipSegmentSD3Encoder
    from longalign.encoders.clip.sdxl import ClipSegmentSDXLEncoder as ClipSegmentSDXLEncoder
    from longalign.encoders.clip.segment import ClipSegmentEncoder as ClipSegmentEncoder
    from longalign.encoders.clip.truncate import ClipTruncateEncoder as ClipTruncateEncoder
    from longalign.encoders.concat import ConcatEncoder as ConcatEncoder
    from longalign.encoders.config import ConcatConfig as ConcatConfig
    from longalign.encoders.config import EncoderConfig as EncoderConfig
    from longalign.encoders.llm.config import LlmConfig as LlmConfig
    from longalign.encoders.llm.encoder import LlmEncoder as LlmEncoder
    from longalign.encoders.t5.adapter import TextAdapter as TextAdapter
    from longalign.encoders.t5.config import AdapterConfig as AdapterConfig
    from longalign.encoders.t5.config import T5Config as T5Config
    from longalign.encoders.t5.encoder import T5Encoder as T5Encoder

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Adapter": "adapter",
        "AdapterConfig": "t5.config",
        "ClipSegmentConfig": "clip.config",
        "ClipSegmentEncoder": "clip.segment",
        "ClipSegmentSD3Config": "clip.config",
        "ClipSegmentSD3Encoder": "clip.sd3",
        "ClipSegmentSDXLConfig": "clip.config",
        "ClipSegmentSDXLEncoder": "clip.sdxl",
        "ClipTruncateConfig": "clip.config",
        "ClipTruncateEncoder": "clip.truncate",
        "ConcatConfig": "config",
        "ConcatEncoder": "concat",
        "Conditioning": "base",
        "Encoder": "base",
        "EncoderConfig": "config",
        "LlmConfig": "llm.config",
        "LlmEncoder": "llm.encoder",
        "LongClipConfig": "clip.config",
        "LongClipEncoder": "clip.longclip",
        "PromptReport": "base",
        "T5Config": "t5.config",
        "T5Encoder": "t5.encoder",
        "T5FluxConfig": "clip.config",
        "T5FluxEncoder": "clip.flux",
        "TextAdapter": "t5.adapter",
        "TruncationWarning": "base",
    },
)
