"""Segment encoders that use the text encoders of a loaded diffusers pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from longalign.encoders.base import Encoder
from longalign.encoders.clip.config import (
    ClipSegmentConfig,
    ClipSegmentSD3Config,
    ClipSegmentSDXLConfig,
    T5FluxConfig,
)
from longalign.encoders.clip.flux import T5FluxEncoder
from longalign.encoders.clip.sd3 import ClipSegmentSD3Encoder
from longalign.encoders.clip.sdxl import ClipSegmentSDXLEncoder
from longalign.encoders.clip.segment import ClipSegmentEncoder
from longalign.segmenters import Packed

SUPPORTED = (
    "pipelines of Stable Diffusion 1.x and 2.x (a UNet and one CLIP), XL (a UNet and two CLIPs) and 3 (two CLIPs, with "
    "T5 or without), and of FLUX.1 (CLIP and T5)"
)
SEGMENT_TOKENS = 40
"""Number of tokens to which sentences are packed. Without fine-tuning on segments, this size and the state of only the
first ``<sot>`` gave the highest fact accuracy that needs no attention mask (docs/studies/segments.md)."""
NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3")

_fast_tokenizers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@contextmanager
def pipeline_encoder(pipe: Any) -> Iterator[Encoder]:
    """Context manager that yields a longalign encoder for long prompts with the text encoders of a pipeline.

    The encoder uses the pipeline's text encoders and tokenizers without copying them. Segments are whole sentences,
    packed to at most 40 tokens; only the first segment keeps the state of its start token. Within the context, the text
    encoders are frozen and in eval mode; their ``requires_grad`` and training mode are restored on exit. Each ``with``
    statement builds a new encoder, so that changes of the text encoders before it, e.g. a LoRA, take effect.

    Args:
        pipe: a diffusers pipeline of Stable Diffusion 1.x, 2.x, XL or 3 or FLUX.1, or a variant such as ControlNet.

    Raises:
        ValueError: if the text encoders are not supported, or a text encoder is not loaded. Only the T5 of Stable
            Diffusion 3 may be missing.
    """
    models = [model for name in NAMES if isinstance(model := getattr(pipe, name, None), nn.Module)]
    modes = [(module, module.training) for model in models for module in model.modules()]
    trainable = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield _build(pipe)
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def _build(pipe: Any) -> Encoder:
    slots = [name for name in NAMES if hasattr(pipe, name)]
    models = [getattr(pipe, name) for name in slots]
    kinds = tuple(_kind(model) for model in models)
    tokenizers = [to_fast_tokenizer(getattr(pipe, name.replace("text_encoder", "tokenizer"), None)) for name in slots]
    segmenter = Packed(SEGMENT_TOKENS)
    if kinds == ("clip",) and hasattr(pipe, "unet"):
        return ClipSegmentEncoder.from_modules(ClipSegmentConfig(sot="first"), models[0], tokenizers[0], segmenter)
    if kinds in (("clip", "projected"), ("projected", "projected")) and hasattr(pipe, "unet"):
        zeros = getattr(pipe.config, "force_zeros_for_empty_prompt", False)
        return ClipSegmentSDXLEncoder.from_modules(
            ClipSegmentSDXLConfig(sot="first"), models, tokenizers, segmenter, empty="zeros" if zeros else "encode"
        )
    if kinds == ("clip", "t5") and hasattr(pipe, "transformer"):
        clip, t5 = zip(models, tokenizers, strict=True)
        return T5FluxEncoder.from_modules(T5FluxConfig(), clip, t5, segmenter)
    width = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "joint_attention_dim", None)
    if kinds in (("projected", "projected", "t5"), ("projected", "projected", None)) and width is not None:
        t5 = None if models[2] is None else (models[2], tokenizers[2])
        config = ClipSegmentSD3Config(sot="first", width=width, t5="zeros" if t5 is None else "encode")
        return ClipSegmentSD3Encoder.from_modules(config, models[:2], tokenizers[:2], segmenter, t5)
    raise ValueError(_unsupported(pipe, slots, models))


def _kind(model: Any) -> str | None:
    """Returns ``"clip"`` for a CLIP text model, ``"projected"`` for one with a projection; None without a model.

    For other models, returns the model type of transformers, e.g. ``"t5"``.
    """
    if model is None:
        return None
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind == "clip_text_model":
        return "projected" if hasattr(model, "text_projection") else "clip"
    return str(kind)


def _unsupported(pipe: Any, slots: Sequence[str], models: Sequence[Any]) -> str:
    descriptions = [
        f"{name}: {'not loaded' if model is None else type(model).__name__}"
        for name, model in zip(slots, models, strict=True)
    ]
    return (
        f"the text encoders of {type(pipe).__name__} are not supported ({', '.join(descriptions) or 'none'}); "
        f"expected {SUPPORTED}. For other pipelines pass an Encoder, or the name or config of an encoder, e.g. "
        "encoder={'name': 'clip-segment', 'checkpoint': 'hub id or folder'}; "
        "`longalign list encoders` lists all encoders"
    )


def to_fast_tokenizer(tokenizer: Any) -> Any:
    """Converts a slow tokenizer, as used by pipelines under transformers 4, to a fast one with character offsets.

    A fast tokenizer, or None, is returned unchanged.
    """
    if tokenizer is None or tokenizer.is_fast:
        return tokenizer
    converted = _fast_tokenizers.get(tokenizer)
    if converted is None or len(converted) != len(tokenizer):
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            converted = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _fast_tokenizers[tokenizer] = converted
    return converted
