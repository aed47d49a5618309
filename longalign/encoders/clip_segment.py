"""Segment-level encoding with CLIP (LongAlign, arXiv 2410.11817, section 3.1 and appendix A)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from longalign.encoders.base import GROW, Conditioning, Encoder, PromptReport, check_prompts, raise_or_warn_truncated
from longalign.encoders.tokens import autocast_disabled, device_of, run_grouped
from longalign.runtime import Runtime
from longalign.segment import Prompt, Segmenter, split, split_to_window
from longalign.tokens import TextTokens, Tokenized

if TYPE_CHECKING:
    from longalign.encoders.configs import ClipSegmentConfig


@dataclass(frozen=True)
class SegmentPlan:
    """What of a prompt is encoded and kept: rows of ids, and of each row the positions ``start:stop``."""

    rows: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, int], ...]
    report: PromptReport

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.kept)


class ClipSegmentEncoder(Encoder):
    """Encodes each segment of a prompt on its own with a frozen CLIP text model and merges the states in order.

    Every segment becomes ``<sot> tokens <eot>``; what of it is kept is chosen by ``sot`` and ``eot``, and the merged
    states are filled up to ``max_tokens``. The published model keeps every ``<sot>``, drops every ``<eot>`` and fills
    with one vector ``<pad*>``: the mean of the last 60 of the 77 states of the encoded empty prompt (of another window,
    the same share of it). The empty prompt is one ``<sot>`` and ``<pad*>`` for the rest.

    The text model is causal and used without a mask, so a prompt's states do not depend on the rest of the batch. With
    ``overflow="grow"`` a longer prompt makes the whole batch longer: the others get more filling.

    Args:
        text_model: a transformers ``CLIPTextModel``.
        tokenizer: its fast tokenizer.
        segmenter: splits a prompt; a segment longer than the window is split further, never cut.
        sot: which segments keep their ``<sot>``.
        eot: which segments keep their ``<eot>``.
        pad: what fills up to ``max_tokens``: ``"pad*"``; ``"pad"``, the empty prompt's state at the same position (its
            last one beyond the window); ``"none"``, nothing: states end with the batch's longest prompt and there is a
            mask.
        max_tokens: number of merged states; shorter prompts are filled up to it.
        overflow: a longer prompt lets the batch ``"grow"``, is ``"truncate"`` with a warning, or is an ``"error"``.
        max_batch_tokens: most positions in one call of the text model.
    """

    def __init__(
        self,
        text_model: nn.Module,
        tokenizer: Any,
        segmenter: Segmenter,
        *,
        sot: Literal["all", "first", "none"] = "all",
        eot: Literal["none", "all", "last"] = "none",
        pad: Literal["pad*", "pad", "none"] = "pad*",
        max_tokens: int = 240,
        overflow: Literal["grow", "truncate", "error"] = "grow",
        max_batch_tokens: int = 16384,
    ):
        super().__init__()
        self.text_model = text_model.requires_grad_(False).eval()
        config: Any = text_model.config
        self.dim = config.hidden_size
        self.window: int = config.max_position_embeddings
        self.tokens = TextTokens(tokenizer, config.vocab_size)
        self.segmenter = segmenter
        self.sot, self.eot, self.pad = sot, eot, pad
        self.max_tokens, self.overflow, self.max_batch_tokens = max_tokens, overflow, max_batch_tokens
        self._padding: Tensor | None = None

    @classmethod
    def from_config(cls, config: ClipSegmentConfig, runtime: Runtime) -> ClipSegmentEncoder:
        """Loads text model and tokenizer, and builds the segmenter."""
        from transformers import CLIPTextModel

        from longalign.encoders.single_file import load_clip_text_model

        model, tokenizer = load_clip_text_model(CLIPTextModel, config, config.subfolder, runtime)
        keys = ("sot", "eot", "pad", "max_tokens", "overflow", "max_batch_tokens")
        return cls(model, tokenizer, config.segmenter.build(runtime), **{key: getattr(config, key) for key in keys})

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        plans = self.checked_plans(prompts)
        return self.merge(plans, *self.run(plans))

    def checked_plans(self, prompts: Sequence[Prompt]) -> list[SegmentPlan]:
        """For `encode`: what of each prompt is encoded and kept; a prompt that is cut is warned of or refused."""
        plans = self._plans(prompts)
        reports = [plan.report for plan in plans]
        raise_or_warn_truncated(reports, self.overflow, self.max_tokens, GROW.format("max_tokens"), stacklevel=4)
        return plans

    def run(self, plans: Sequence[SegmentPlan], more: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, list[int]]:
        """All states ``(m, d)`` of the plans' rows and then of ``more`` rows, and where among them each row begins."""
        return run_grouped(
            self._run,
            [*(row for plan in plans for row in plan.rows), *more],
            pad_id=self.tokens.tokenizer.eos_token_id,
            device=device_of(self.text_model),
            max_batch_tokens=self.max_batch_tokens,
        )

    def merge(self, plans: Sequence[SegmentPlan], states: Tensor, first: Sequence[int]) -> Conditioning:
        """What is kept of the states ``(m, d)`` that `run` gave, in order and filled up."""
        filling = self._pad_states(states)
        longest = max(plan.length for plan in plans)
        length = longest if self.pad == "none" else max(self.max_tokens, longest)
        index = np.empty((len(plans), length), dtype=np.int64)
        index[:] = len(states) + np.minimum(np.arange(length), len(filling) - 1)
        begins = iter(first)
        for row, plan in zip(index, plans, strict=True):
            kept = [np.arange(start, stop) + begin for (start, stop), begin in zip(plan.kept, begins, strict=False)]
            row[: plan.length] = np.concatenate(kept)
        mask = None
        if self.pad == "none":
            lengths = np.array([[plan.length] for plan in plans])
            mask = torch.from_numpy(np.arange(length) < lengths).to(states.device)
        merged = torch.cat([states, filling])[torch.from_numpy(index).to(states.device)]
        return Conditioning(merged, mask, reports=tuple(plan.report for plan in plans))

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return [plan.report for plan in self._plans(prompts)]

    def _run(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        return self.text_model(input_ids=ids).last_hidden_state

    @torch.no_grad()
    def _pad_states(self, like: Tensor) -> Tensor:
        """States ``(k, d)`` for filling: position i takes state ``min(i, k - 1)``. Kept, since the model is frozen."""
        kept = self._padding
        if kept is None or kept.device != like.device or kept.dtype != like.dtype:
            kept = like.new_zeros(1, self.dim) if self.pad == "none" else self._empty(like.device)
            if self.pad == "pad*":
                share = max(1, round(self.window * 60 / 77))
                kept = kept[-share:].mean(0, keepdim=True)
            self._padding = kept
        return kept

    def _empty(self, device: torch.device) -> Tensor:
        """States ``(window, d)`` of the empty prompt."""
        tokenizer = self.tokens.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id] + [pad_id] * (self.window - 2)
        with autocast_disabled(device):
            return self._run(torch.tensor([ids], device=device))[0, :, : self.dim]

    def _plans(self, prompts: Sequence[Prompt]) -> list[SegmentPlan]:
        room, count = self.window - 2, self.tokens.count
        found = [split(self.segmenter, prompt, count) for prompt in check_prompts(prompts)]
        self.tokens.batch([segment for segments in found for segment in segments])
        return [self._plan(self.tokens.batch(split_to_window(segments, room, count))) for segments in found]

    def _plan(self, segments: Sequence[Tokenized]) -> SegmentPlan:
        tokenizer = self.tokens.tokenizer
        segments = [s for s in segments if s.ids] or [Tokenized("", (), ())]
        left = sys.maxsize if self.overflow == "grow" else self.max_tokens
        rows, kept, texts, tokens, cut = [], [], [], [], []
        for i, segment in enumerate(segments):
            start = 0 if self.sot == "all" or (self.sot == "first" and i == 0) else 1
            with_eot = self.eot == "all" or (self.eot == "last" and i == len(segments) - 1)
            stop = min(len(segment) + 1 + with_eot, start + left)
            num_read = max(0, min(stop - 1, len(segment)))
            read, unread = segment.split(num_read)
            if stop > start:
                rows.append((tokenizer.bos_token_id, *segment.ids, tokenizer.eos_token_id))
                kept.append((start, stop))
                left -= stop - start
            if num_read:
                texts.append(read)
                tokens.append(num_read)
            if unread:
                cut.append(unread)
        if not rows:
            # attention needs something to attend to, whatever the strategy
            rows, kept = [(tokenizer.bos_token_id, tokenizer.eos_token_id)], [(0, 1)]
        return SegmentPlan(tuple(rows), tuple(kept), PromptReport(tuple(texts), tuple(tokens), " ".join(cut)))
