"""Encoding for FLUX.1: T5's states of the whole prompt, and CLIP-L's pooled embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.clip.config import ClipSegmentConfig, T5FluxConfig
from longalign.encoders.clip.segment import ClipSegmentEncoder
from longalign.encoders.loading import load_text_model
from longalign.encoders.t5.config import T5Config
from longalign.encoders.t5.encoder import T5Encoder
from longalign.files.paths import join_subfolder
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, Segmenter, check_prompts, plain_text


class T5FluxEncoder(Encoder):
    """Encodes the whole prompt with T5; the pooled embedding comes from CLIP-L.

    The pooled output of a text is CLIP-L's last hidden state at ``<eot>``, after the final layer norm.

    Args:
        t5: encoder with T5, whose states are returned.
        clip: encoder with CLIP-L, which also splits the prompt into segments for ``pooled="mean"`` and ``"first"``.
        pooled: which pooled output is used: ``"mean"`` over all segments, that of the ``"first"`` segment, or
            ``"truncate"``: that of the whole prompt truncated to 77 tokens, as in diffusers.
    """

    def __init__(self, t5: T5Encoder, clip: ClipSegmentEncoder, *, pooled: Literal["mean", "first", "truncate"]):
        super().__init__()
        self.t5, self.clip, self.pooled = t5, clip, pooled
        self.dim = t5.dim

    @classmethod
    def from_config(cls, config: T5FluxConfig, runtime: Runtime) -> T5FluxEncoder:
        """Loads ``text_encoder``, ``text_encoder_2`` and their tokenizers, and builds the segmenter.

        Raises:
            ValueError: if the checkpoint does not exist or is incomplete.
        """
        clip, t5 = (
            load_text_model(kind, config, join_subfolder(config.subfolder, folder), runtime)
            for kind, folder in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
        )
        return cls.from_modules(config, clip, t5, config.segmenter.build(runtime))

    @classmethod
    def from_modules(
        cls, config: T5FluxConfig, clip: tuple[nn.Module, Any], t5: tuple[nn.Module, Any], segmenter: Segmenter
    ) -> Self:
        """Builds the encoder from loaded modules, with the settings of a config.

        Args:
            config: settings of the encoder.
            clip: a ``CLIPTextModel`` and its fast tokenizer.
            t5: a ``T5EncoderModel`` and its fast tokenizer.
            segmenter: splits a prompt into segments for CLIP.
        """
        limit = config.max_batch_tokens
        settings = T5Config(
            max_tokens=config.max_tokens, overflow=config.overflow, window=config.window, max_batch_tokens=limit
        )
        return cls(
            T5Encoder.from_modules(settings, *t5, None),
            ClipSegmentEncoder.from_modules(ClipSegmentConfig(max_batch_tokens=limit), *clip, segmenter),
            pooled=config.pooled,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        prompts = check_prompts(prompts)
        conditioning = self.t5.encode(prompts)
        pools = [self._pool_rows(prompt) for prompt in prompts]
        states, starts = self.clip.run([], [row for rows in pools for row in rows])
        first = iter(starts)
        pooled = [torch.stack([states[next(first) + len(row) - 1] for row in rows]).mean(0) for rows in pools]
        return replace(conditioning, pooled=torch.stack(pooled))

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return self.t5.report(prompts)

    def _pool_rows(self, prompt: Prompt) -> Sequence[tuple[int, ...]]:
        """Returns the token ids of each text whose pooled output is averaged into the prompt's pooled embedding."""
        if self.pooled != "truncate":
            (plan,) = self.clip.checked_plans([prompt])
            return plan.rows if self.pooled == "mean" else plan.rows[:1]
        tokens = self.clip.tokens
        ids = tokens(plain_text(prompt)).ids[: self.clip.window - 2]
        return [(tokens.tokenizer.bos_token_id, *ids, tokens.tokenizer.eos_token_id)]
