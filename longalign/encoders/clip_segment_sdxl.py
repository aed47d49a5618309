"""Segment-level encoding for Stable Diffusion XL, whose states come from two CLIPs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from longalign.encoders.base import Conditioning, Encoder, PromptReport, check_prompts, plain_text
from longalign.encoders.clip_segment import ClipSegmentEncoder, SegmentPlan
from longalign.files import join_subfolder
from longalign.runtime import Runtime
from longalign.segment import Prompt, Segmenter

if TYPE_CHECKING:
    from longalign.encoders.configs import ClipSegmentSDXLConfig, TwoClipsConfig


class _Penultimate(ClipSegmentEncoder):
    """Segments in the states before the last layer, which no norm follows: what SDXL is told."""

    def states_and_pooled(
        self, plans: Sequence[SegmentPlan], pools: Sequence[Sequence[tuple[int, ...]]]
    ) -> Conditioning:
        """The merged states of prompts; with a projection also the mean pooled output of each prompt's rows of ids."""
        return self.merge(plans, *self.run(plans))

    def _run(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        return self.text_model(input_ids=ids, output_hidden_states=True).hidden_states[-2]


class _Projected(_Penultimate):
    """As `_Penultimate`; beside each state is the last layer's, normed and projected, of which ``<eot>``'s is the
    pooled output."""

    def states_and_pooled(
        self, plans: Sequence[SegmentPlan], pools: Sequence[Sequence[tuple[int, ...]]]
    ) -> Conditioning:
        states, first = self.run(plans, [row for rows in pools for row in rows])
        ends = iter(first[sum(len(plan.rows) for plan in plans) :])
        projected = states[:, self.dim :]
        pooled = [torch.stack([projected[next(ends) + len(row) - 1] for row in rows]).mean(0) for rows in pools]
        return replace(self.merge(plans, states[:, : self.dim], first), pooled=torch.stack(pooled))

    def _run(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        conditioning = self.text_model(input_ids=ids, output_hidden_states=True)
        projection: Any = self.text_model.text_projection
        return torch.cat([conditioning.hidden_states[-2], projection(conditioning.last_hidden_state)], dim=-1)


class ClipSegmentSDXLEncoder(Encoder):
    """Each segment of a prompt through CLIP-L and OpenCLIP-bigG, merged as by `ClipSegmentEncoder`; the states of both
    lie side by side (768 + 1280 wide) and come from the layer before the last.

    A prompt has one pooled embedding, of bigG; of both, side by side, where both have a projection, as in Stable
    Diffusion 3. For a prompt of one segment all rules give what diffusers gives, unless it has an exclamation mark.
    With this token bigG is padded, so that diffusers tells it of padding where one stands in a text; here both CLIPs
    read the tokens of the first tokenizer.

    Args:
        text_models: a ``CLIPTextModel`` and a ``CLIPTextModelWithProjection``, or two of the latter.
        tokenizers: their fast tokenizers, which differ in their padding alone.
        segmenter: splits a prompt.
        pooled: the rule: ``"mean"`` of the pooled outputs of all segments that were read, that of the ``"first"``
            segment, or ``"truncate"``: that of the whole prompt cut at 77 tokens, as diffusers has it.
        empty: the empty prompt is told as ``"zeros"``, as SDXL's pipeline has it, or is ``"encode"``-d like others.
        **settings: ``sot, eot, pad, max_tokens, overflow, max_batch_tokens`` of `ClipSegmentEncoder`.

    Raises:
        ValueError: if the vocabularies differ.
    """

    def __init__(
        self,
        text_models: tuple[nn.Module, nn.Module],
        tokenizers: tuple[Any, Any],
        segmenter: Segmenter,
        *,
        pooled: Literal["mean", "first", "truncate"] = "mean",
        empty: Literal["zeros", "encode"] = "zeros",
        **settings: Any,
    ):
        super().__init__()
        if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
            raise ValueError("the two tokenizers have different vocabularies; expected those of one checkpoint")
        self.first, self.second = (
            (_Projected if hasattr(model, "text_projection") else _Penultimate)(model, tokenizer, segmenter, **settings)
            for model, tokenizer in zip(text_models, tokenizers, strict=True)
        )
        self.dim = self.first.dim + self.second.dim
        self.pooled, self.empty = pooled, empty

    @classmethod
    def from_config(cls, config: ClipSegmentSDXLConfig, runtime: Runtime) -> ClipSegmentSDXLEncoder:
        """Loads ``text_encoder``, ``text_encoder_2`` and their tokenizers, and builds the segmenter."""
        from transformers import CLIPTextModel

        return load_clip_pair(config, runtime, CLIPTextModel, empty=config.empty)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        prompts = check_prompts(prompts)
        plans = self.first.checked_plans(prompts)
        pools = [self._pool_rows(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]
        conditioning = [part.states_and_pooled(plans, pools) for part in (self.first, self.second)]
        merged = torch.cat([part.states for part in conditioning], dim=-1)
        pooled = torch.cat([part.pooled for part in conditioning if part.pooled is not None], dim=-1)
        if self.empty == "zeros":
            blank = torch.tensor([not plain_text(prompt).strip() for prompt in prompts], device=merged.device)
            merged = merged.masked_fill(blank[:, None, None], 0)
            pooled = pooled.masked_fill(blank[:, None], 0)
        return replace(conditioning[0], states=merged, pooled=pooled)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return self.first.report(prompts)

    def _pool_rows(self, prompt: Prompt, plan: SegmentPlan) -> Sequence[tuple[int, ...]]:
        if self.pooled == "mean":
            return plan.rows
        if self.pooled == "first":
            return plan.rows[:1]
        tokens = self.first.tokens
        ids = tokens(plain_text(prompt)).ids[: self.first.window - 2]
        return [(tokens.tokenizer.bos_token_id, *ids, tokens.tokenizer.eos_token_id)]


def load_clip_pair(config: TwoClipsConfig, runtime: Runtime, first: type, **settings: Any) -> ClipSegmentSDXLEncoder:
    """Loads ``text_encoder``, a ``first``, ``text_encoder_2`` and their tokenizers, and builds the segmenter."""
    from transformers import CLIPTextModelWithProjection

    from longalign.encoders.single_file import load_clip_text_model

    kinds = {"text_encoder": first, "text_encoder_2": CLIPTextModelWithProjection}
    loaded = [
        load_clip_text_model(kind, config, join_subfolder(config.subfolder, folder), runtime)
        for folder, kind in kinds.items()
    ]
    models, tokenizers = zip(*loaded, strict=True)
    keys = ("pooled", "sot", "eot", "pad", "max_tokens", "overflow", "max_batch_tokens")
    settings |= {key: getattr(config, key) for key in keys}
    return ClipSegmentSDXLEncoder(models, tokenizers, config.segmenter.build(runtime), **settings)
