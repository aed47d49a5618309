"""Segment-level encoding for Stable Diffusion XL with the concatenated states of two CLIPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.clip.config import ClipSegmentSDXLConfig, TwoClipsConfig
from longalign.encoders.clip.segment import ClipSegmentEncoder, SegmentPlan
from longalign.encoders.clip.single_file import load_clip_text_model
from longalign.files.paths import join_subfolder
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, Segmenter, check_prompts, plain_text


class PenultimateEncoder(ClipSegmentEncoder):
    """Encodes segments like `ClipSegmentEncoder`, but with the penultimate layer's states, without final layer norm.

    SDXL and SD 3 expect these states.
    """

    def states_and_pooled(
        self, plans: Sequence[SegmentPlan], pools: Sequence[Sequence[tuple[int, ...]]]
    ) -> Conditioning:
        """Returns the conditioning of b prompts that are split into segments; without pooled embeddings here.

        Overridden in `ProjectedEncoder`, whose conditioning has pooled embeddings ``(b, p)``; ``pools`` is not used
        here.

        Args:
            plans: the plan of each prompt, from `checked_plans`.
            pools: for each prompt, the token ids of one or more texts. The pooled embedding of a prompt is the mean of
                the pooled outputs of these texts.
        """
        return self.merge(plans, *self.run(plans))

    def _run(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.text_model(input_ids=ids, output_hidden_states=True).hidden_states[-2]


class ProjectedEncoder(PenultimateEncoder):
    """Encodes segments like `PenultimateEncoder`, with pooled embeddings. Use `states_and_pooled`, not ``encode``.

    The pooled output of a text is the state of the last layer at the end token ``<eot>``, after the final layer norm
    and the text projection.
    """

    def states_and_pooled(
        self, plans: Sequence[SegmentPlan], pools: Sequence[Sequence[tuple[int, ...]]]
    ) -> Conditioning:
        states, row_starts = self.run(plans, [row for rows in pools for row in rows])
        pool_starts = iter(row_starts[sum(len(plan.rows) for plan in plans) :])
        projected = states[:, self.dim :]
        pooled = [torch.stack([projected[next(pool_starts) + len(row) - 1] for row in rows]).mean(0) for rows in pools]
        return replace(self.merge(plans, states[:, : self.dim], row_starts), pooled=torch.stack(pooled))

    def _run(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = self.text_model(input_ids=ids, output_hidden_states=True)
        projection: Any = self.text_model.text_projection
        return torch.cat([output.hidden_states[-2], projection(output.last_hidden_state)], dim=-1)


class ClipSegmentSDXLEncoder(Encoder):
    """Encodes segments with CLIP-L and OpenCLIP-bigG, and concatenates their states as `ClipSegmentEncoder` does.

    The states of both penultimate layers are concatenated along the channel axis to width 768 + 1280. The pooled
    embedding is bigG's, of width 1280. If both CLIPs have a projection, as in Stable Diffusion 3, both pooled
    embeddings are concatenated.

    For a prompt of one segment, every value of ``pooled`` gives the pooled embedding of diffusers, unless the prompt
    contains an exclamation mark. ``!`` is bigG's padding token, so diffusers treats a literal ``!`` as padding. Here
    both CLIPs receive the token ids of the first tokenizer.

    Args:
        first: encoder with CLIP-L; its segmenter, tokenizer and settings also split and tokenize prompts for
            ``second``.
        second: encoder with OpenCLIP-bigG.
        pooled: which pooled output is used: ``"mean"`` over all encoded segments, that of the ``"first"`` segment, or
            ``"truncate"``: that of the whole prompt truncated to 77 tokens, as in diffusers.
        empty: states and pooled embedding of the empty prompt: ``"zeros"``, as in diffusers' SDXL pipeline, or
            ``"encode"``, as for any other prompt.

    Raises:
        ValueError: if the vocabularies of the two tokenizers differ.
    """

    def __init__(
        self,
        first: PenultimateEncoder,
        second: PenultimateEncoder,
        *,
        pooled: Literal["mean", "first", "truncate"],
        empty: Literal["zeros", "encode"],
    ):
        super().__init__()
        if first.tokens.tokenizer.get_vocab() != second.tokens.tokenizer.get_vocab():
            raise ValueError(
                "expected two tokenizers with the same vocabulary, got different vocabularies; load both from one "
                "checkpoint"
            )
        self.first, self.second = first, second
        self.dim = first.dim + second.dim
        self.pooled, self.empty = pooled, empty

    @classmethod
    def from_config(cls, config: ClipSegmentSDXLConfig, runtime: Runtime) -> ClipSegmentSDXLEncoder:
        """Loads ``text_encoder``, ``text_encoder_2`` and their tokenizers, and builds the segmenter.

        Raises:
            FileNotFoundError: if the checkpoint is a single file that does not exist.
            ValueError: if the checkpoint does not exist or is incomplete.
        """
        models, tokenizers = load_clip_pair(config, runtime, CLIPTextModel, config.layout)
        return cls.from_modules(config, models, tokenizers, config.segmenter.build(runtime), empty=config.empty)

    @classmethod
    def from_modules(
        cls,
        config: TwoClipsConfig,
        text_models: Sequence[nn.Module],
        tokenizers: Sequence[Any],
        segmenter: Segmenter,
        *,
        empty: Literal["zeros", "encode"],
    ) -> Self:
        """Builds the encoder from loaded modules, with the settings of a config.

        Args:
            config: settings of both CLIPs.
            text_models: a ``CLIPTextModel`` and a ``CLIPTextModelWithProjection``, or two of the latter.
            tokenizers: the fast tokenizers of ``text_models``, which differ only in padding.
            segmenter: splits a prompt into segments.
            empty: states and pooled embedding of the empty prompt: ``"zeros"`` or ``"encode"``.
        """
        first, second = (
            (ProjectedEncoder if hasattr(model, "text_projection") else PenultimateEncoder).from_modules(
                config, model, tokenizer, segmenter
            )
            for model, tokenizer in zip(text_models, tokenizers, strict=True)
        )
        return cls(first, second, pooled=config.pooled, empty=empty)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        prompts = check_prompts(prompts)
        plans = self.first.checked_plans(prompts)
        pools = [self._pool_rows(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]
        parts = [encoder.states_and_pooled(plans, pools) for encoder in (self.first, self.second)]
        states = torch.cat([part.states for part in parts], dim=-1)
        pooled = torch.cat([part.pooled for part in parts if part.pooled is not None], dim=-1)
        if self.empty == "zeros":
            is_empty = torch.tensor([not plain_text(prompt).strip() for prompt in prompts], device=states.device)
            states = states.masked_fill(is_empty[:, None, None], 0)
            pooled = pooled.masked_fill(is_empty[:, None], 0)
        return replace(parts[0], states=states, pooled=pooled)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return self.first.report(prompts)

    def _pool_rows(self, prompt: Prompt, plan: SegmentPlan) -> Sequence[tuple[int, ...]]:
        """Returns the token ids of each text whose pooled output is averaged into the prompt's pooled embedding."""
        if self.pooled == "mean":
            return plan.rows
        if self.pooled == "first":
            return plan.rows[:1]
        tokens = self.first.tokens
        ids = tokens(plain_text(prompt)).ids[: self.first.window - 2]
        return [(tokens.tokenizer.bos_token_id, *ids, tokens.tokenizer.eos_token_id)]


def load_clip_pair(
    config: TwoClipsConfig, runtime: Runtime, first_class: type, layout: str | None
) -> tuple[list[nn.Module], list[Any]]:
    """Loads ``text_encoder`` and ``text_encoder_2`` with their tokenizers.

    Returns ``(models, tokenizers)``, two lists of two. ``first_class`` is the transformers class of ``text_encoder``;
    that of ``text_encoder_2`` is ``CLIPTextModelWithProjection``. `load_clip_text_model` explains ``layout``.
    """
    classes = {"text_encoder": first_class, "text_encoder_2": CLIPTextModelWithProjection}
    loaded = [
        load_clip_text_model(model_class, config, join_subfolder(config.subfolder, folder), runtime, layout)
        for folder, model_class in classes.items()
    ]
    return [model for model, _ in loaded], [tokenizer for _, tokenizer in loaded]
