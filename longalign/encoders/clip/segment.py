"""Segment-level encoding with CLIP (LongAlign, arXiv 2410.11817, section 3.1 and appendix A)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from longalign.encoders.base import (
    GROW_ADVICE,
    Conditioning,
    Encoder,
    PromptReport,
    raise_or_warn_truncated,
)
from longalign.encoders.clip.config import ClipSegmentConfig, SegmentConfig
from longalign.encoders.clip.single_file import load_clip_text_model
from longalign.encoders.frozen import autocast_disabled, device_of, run_grouped
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, Segmenter, check_prompts, split, split_to_window
from longalign.tokens import TextTokens, Tokenized


@dataclass(frozen=True)
class SegmentPlan:
    """How one prompt is encoded: the token sequences to run, and which of their states to keep.

    Attributes:
        rows: token ids of each segment: ``<sot>``, context (see `ClipSegmentEncoder`), segment, ``<eot>``.
        spans: tuples ``(row, start, stop)``: the states at positions ``start:stop`` of ``rows[row]`` are kept, in this
            order.
        report: the encoded and the truncated text.
    """

    rows: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int, int], ...]
    report: PromptReport

    @property
    def length(self) -> int:
        """Number of states that are kept, before padding."""
        return sum(stop - start for _, start, stop in self.spans)


class ClipSegmentEncoder(Encoder):
    """Encodes each segment of a prompt separately with a frozen CLIP text model and concatenates the states in order.

    A segment is a short text, such as a sentence. Every segment becomes ``<sot> tokens <eot>``, with CLIP's start and
    end token; ``sot`` and ``eot`` select which states of these two are kept. The concatenated states are padded to
    ``max_tokens``. LongAlign's published model (arXiv 2410.11817, appendix A) keeps every ``<sot>``, drops every
    ``<eot>`` and pads with one vector ``<pad*>``. That vector is the mean of the last 60 of the 77 states of the empty
    prompt, or of the same fraction if the text model has a different window (number of positions). The empty prompt is
    encoded as one ``<sot>`` followed by ``<pad*>``.

    With ``context``, the text model reads some preceding segments before each segment, as
    ``<sot> context tokens <eot>``, and the states of the context are dropped. References to an earlier segment ("It is
    red.") can then be resolved, while the number of states stays the same.

    The text model is causal and used without a mask, so a prompt's states do not depend on the rest of the batch. Only
    the amount of padding does: with ``overflow="grow"``, the batch is padded to the longest prompt.

    Args:
        text_model: a transformers ``CLIPTextModel``.
        tokenizer: the text model's fast tokenizer.
        segmenter: splits a prompt into segments.
        sot: which segments keep their ``<sot>`` state: ``"all"``, ``"first"`` or ``"none"``.
        eot: which segments keep their ``<eot>`` state: ``"all"``, ``"last"`` or ``"none"``.
        context: number of preceding segments that are encoded with each segment, as far as they fit the window.
        pad: how states are padded. ``"pad*"`` repeats ``<pad*>``. ``"pad"`` uses the empty prompt's state at the same
            position; beyond the window, its last state. ``"none"`` pads to the longest prompt of the batch, with a
            mask.
        max_tokens: number of states to which shorter prompts are padded; with ``pad="none"``, only the limit for
            ``overflow``.
        overflow: what to do with prompts of more than ``max_tokens`` states: ``"grow"`` pads the batch to the longest
            prompt, ``"truncate"`` truncates with a warning, ``"error"`` raises.
        truncate_segments: whether a segment longer than the window is truncated with a warning. If False, it is split
            into segments that fit.
        max_batch_tokens: maximum number of tokens, including padding, per call of the text model.
    """

    def __init__(
        self,
        text_model: nn.Module,
        tokenizer: Any,
        segmenter: Segmenter,
        *,
        sot: Literal["all", "first", "none"],
        eot: Literal["none", "all", "last"],
        context: int,
        pad: Literal["pad*", "pad", "none"],
        max_tokens: int,
        overflow: Literal["grow", "truncate", "error"],
        truncate_segments: bool,
        max_batch_tokens: int,
    ):
        super().__init__()
        self.text_model = text_model.requires_grad_(False).eval()
        config: Any = text_model.config
        self.dim = config.hidden_size
        self.window: int = config.max_position_embeddings
        self.tokens = TextTokens(tokenizer, config.vocab_size)
        self.segmenter = segmenter
        self.sot, self.eot, self.context, self.pad = sot, eot, context, pad
        self.max_tokens, self.overflow, self.max_batch_tokens = max_tokens, overflow, max_batch_tokens
        self.truncate_segments = truncate_segments
        self._cached_padding: Tensor | None = None

    @classmethod
    def from_config(cls, config: ClipSegmentConfig, runtime: Runtime) -> ClipSegmentEncoder:
        """Loads the text model and tokenizer, and builds the segmenter.

        Raises:
            FileNotFoundError: if the checkpoint is a single file that does not exist.
            ValueError: if the checkpoint does not exist or is incomplete.
        """
        model, tokenizer = load_clip_text_model(CLIPTextModel, config, config.subfolder, runtime, config.layout)
        return cls.from_modules(config, model, tokenizer, config.segmenter.build(runtime))

    @classmethod
    def from_modules(cls, config: SegmentConfig, text_model: nn.Module, tokenizer: Any, segmenter: Segmenter) -> Self:
        """Builds the encoder from loaded modules, with the settings of a config. See the class for the modules."""
        return cls(
            text_model,
            tokenizer,
            segmenter,
            sot=config.sot,
            eot=config.eot,
            context=config.context,
            pad=config.pad,
            max_tokens=config.max_tokens,
            overflow=config.overflow,
            truncate_segments=config.truncate_segments,
            max_batch_tokens=config.max_batch_tokens,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        plans = self.checked_plans(prompts)
        return self.merge(plans, *self.run(plans))

    def checked_plans(self, prompts: Sequence[Prompt]) -> list[SegmentPlan]:
        """Returns the `SegmentPlan` of each prompt.

        If a prompt is truncated, raises ValueError if ``overflow`` is ``"error"``, and warns otherwise.
        """
        plans = self._plans(prompts)
        limits, advice = [f"{self.max_tokens} tokens"], [GROW_ADVICE.format("max_tokens")]
        if self.truncate_segments:
            limits.append(f"{self.window - 2} tokens in a segment")
            advice = ["set truncate_segments to false", *(advice if self.overflow == "truncate" else [])]
        reports = [plan.report for plan in plans]
        raise_or_warn_truncated(reports, self.overflow, " or ".join(limits), ", and ".join(advice), stacklevel=4)
        return plans

    def run(self, plans: Sequence[SegmentPlan], extra_rows: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, list[int]]:
        """Runs the text model on the rows of the plans, then on ``extra_rows``: token ids with special tokens.

        Returns:
            The states of all rows ``(m, d)``, and for each row, in this order, the index of its first state.
        """
        return run_grouped(
            self._run,
            [*(row for plan in plans for row in plan.rows), *extra_rows],
            pad_id=self.tokens.tokenizer.eos_token_id,
            device=device_of(self.text_model),
            max_batch_tokens=self.max_batch_tokens,
        )

    def merge(self, plans: Sequence[SegmentPlan], states: Tensor, row_starts: Sequence[int]) -> Conditioning:
        """Returns the conditioning of planned prompts: concatenates the states to keep, in order, and pads them.

        ``states`` ``(m, d)`` and ``row_starts`` are the output of `run`.
        """
        padding = self._pad_states(states)
        longest = max(plan.length for plan in plans)
        length = longest if self.pad == "none" else max(self.max_tokens, longest)
        index = np.empty((len(plans), length), dtype=np.int64)
        index[:] = len(states) + np.minimum(np.arange(length), len(padding) - 1)
        first = 0
        for merged_row, plan in zip(index, plans, strict=True):
            spans = [np.arange(start, stop) + row_starts[first + row] for row, start, stop in plan.spans]
            merged_row[: plan.length] = np.concatenate(spans)
            first += len(plan.rows)
        mask = None
        if self.pad == "none":
            lengths = np.array([[plan.length] for plan in plans])
            mask = torch.from_numpy(np.arange(length) < lengths).to(states.device)
        merged = torch.cat([states, padding])[torch.from_numpy(index).to(states.device)]
        return Conditioning(merged, mask, reports=tuple(plan.report for plan in plans))

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return [plan.report for plan in self._plans(prompts)]

    def _run(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.text_model(input_ids=ids).last_hidden_state

    @torch.no_grad()
    def _pad_states(self, like: Tensor) -> Tensor:
        """Returns the padding states ``(k, d)`` on the device and in the dtype of ``like``.

        Position i of a prompt is padded with state ``min(i, k - 1)``. The states are computed once, since the text
        model is frozen.
        """
        padding = self._cached_padding
        if padding is None or padding.device != like.device or padding.dtype != like.dtype:
            padding = like.new_zeros(1, self.dim) if self.pad == "none" else self._empty_prompt_states(like.device)
            if self.pad == "pad*":
                num_states = max(1, round(self.window * 60 / 77))
                padding = padding[-num_states:].mean(0, keepdim=True)
            self._cached_padding = padding
        return padding

    def _empty_prompt_states(self, device: torch.device) -> Tensor:
        """Returns the states ``(window, d)`` of the empty prompt, padded to the text model's window."""
        tokenizer = self.tokens.tokenizer
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id] + [self.tokens.pad_id] * (self.window - 2)
        with autocast_disabled(device):
            return self._run(torch.tensor([ids], device=device))[0, :, : self.dim]

    def _plans(self, prompts: Sequence[Prompt]) -> list[SegmentPlan]:
        limit, count = self.window - 2, self.tokens.count
        prompt_segments = [split(self.segmenter, prompt, count) for prompt in check_prompts(prompts)]
        # tokenize all segments in one call; later calls take them from the cache
        self.tokens.batch([segment for segments in prompt_segments for segment in segments])
        if not self.truncate_segments:
            prompt_segments = [split_to_window(segments, limit, count) for segments in prompt_segments]
        return [self._plan(self.tokens.batch(segments)) for segments in prompt_segments]

    def _plan(self, segments: Sequence[Tokenized]) -> SegmentPlan:
        tokenizer = self.tokens.tokenizer
        segments = [s for s in segments if s.ids] or [Tokenized("", (), ())]
        budget = sys.maxsize if self.overflow == "grow" else self.max_tokens
        rows, spans, texts, tokens, truncated = [], [], [], [], []
        for i, segment in enumerate(segments):
            with_sot = self.sot == "all" or (self.sot == "first" and i == 0)
            with_eot = self.eot == "all" or (self.eot == "last" and i == len(segments) - 1)
            ids = segment.ids[: self.window - 2]
            kept = min(with_sot + len(ids) + with_eot, budget)
            num_encoded = max(0, min(kept - with_sot, len(ids)))
            head, tail = segment.split_at(num_encoded)
            if kept:
                context = self._context(segments, i)
                first = 1 + len(context)  # position of the segment's first token; that of <sot> is 0
                row = len(rows)
                rows.append((tokenizer.bos_token_id, *context, *ids, tokenizer.eos_token_id))
                spans += [(row, 0, 1)] if with_sot else []
                spans += [(row, first, first + kept - with_sot)] if kept > with_sot else []
                budget -= kept
            if num_encoded:
                texts.append(head)
                tokens.append(num_encoded)
            if tail:
                truncated.append(tail)
        if not rows:
            # keep at least one state so that cross-attention is defined
            rows, spans = [(tokenizer.bos_token_id, tokenizer.eos_token_id)], [(0, 0, 1)]
        return SegmentPlan(tuple(rows), tuple(spans), PromptReport(tuple(texts), tuple(tokens), " ".join(truncated)))

    def _context(self, segments: Sequence[Tokenized], index: int) -> list[int]:
        """Returns the token ids of the context of segment ``index``: up to ``self.context`` segments before it.

        Goes back from segment ``index``, and stops at the first segment that would exceed the text model's window.
        """
        ids: list[int] = []
        space = self.window - 2 - len(segments[index])
        for segment in reversed(segments[max(0, index - self.context) : index]):
            if len(ids) + len(segment) > space:
                break
            ids = [*segment.ids, *ids]
        return ids
