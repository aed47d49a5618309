"""Encoding with the hidden states of a language model, as FLUX.2, Qwen-Image, Z-Image and Sana need."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel

from longalign.encoders.base import Conditioning, Encoder, PromptReport, raise_or_warn_truncated, report_passes
from longalign.encoders.frozen import device_of, pad_with_last, run_grouped
from longalign.encoders.llm.config import CHAT, SLOT, LlmConfig
from longalign.encoders.llm.template import Template, TemplateRow, chat_template
from longalign.encoders.loading import load_frozen_model, load_tokenizer, subfolders
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.segmenters import Prompt, Segmenter, check_prompts, plain_text, split
from longalign.tokens import TextTokens

_PADDING = -1
"""Stands for a padding token, which is masked. The tokenizer's own may also be part of a template."""


class LlmEncoder(Encoder):
    """Encodes prompts, each inside a template, with a frozen language model.

    ``prefix`` selects which states of the template before the prompt are kept; those after the prompt are always kept.
    With a segmenter, each segment is encoded separately in the template. The states of the segments are then
    concatenated; template states are kept only before the first and after the last segment.

    Without ``pad_to``, a batch is padded to the longest prompt, with a mask. The model is causal, so a prompt's states
    do not depend on the padding. With ``pad_to``, the padding states are those of padding tokens, and the conditioning
    has no mask. The padding tokens belong to the last forward pass of a prompt, or to the first one if the tokenizer
    pads on the left. In the language model, no other token attends to them. If a batch has a prompt of more than
    ``pad_to`` states, the last state of each shorter prompt is repeated.

    Args:
        model: a causal transformers model without a head, e.g. a ``Qwen3Model``.
        tokenizer: the model's fast tokenizer.
        segmenter: splits a prompt into segments; None encodes the whole prompt.
        template: ``"chat"`` for the tokenizer's chat template, or a text with ``{}`` in place of the prompt.
        system: system message for the chat template; None for that of the chat template, if any.
        template_variables: values of variables of the chat template.
        prefix: which states of the template before the prompt are kept: ``"all"``, ``"first"`` or ``"none"``.
        layers: layers whose states are concatenated along the width, as indices of transformers' ``hidden_states``: -1
            for the last one, after the final normalization.
        lowercase: whether prompts are converted to lower case.
        max_tokens: maximum number of tokens of the prompt, or of a segment, per forward pass, without those of the
            template.
        pad_to: number of states to which shorter prompts are padded without a mask; None pads with a mask.
        overflow: what to do with prompts of more than ``max_tokens`` tokens if there is no segmenter: ``"truncate"``
            truncates with a warning, ``"error"`` raises. With a segmenter, long segments are split.
        max_batch_tokens: maximum number of tokens, including template and padding, per call of the model.

    Raises:
        ValueError: if the chat template cannot be used, no state of an empty prompt would be kept, ``max_tokens`` plus
            the tokens of the template or ``pad_to`` exceed the model's positions, or the model has no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        segmenter: Segmenter | None,
        *,
        template: str,
        system: str | None,
        template_variables: Mapping[str, Any],
        prefix: Literal["all", "first", "none"],
        layers: Sequence[int],
        lowercase: bool,
        max_tokens: int,
        pad_to: int | None,
        overflow: Literal["truncate", "error"],
        max_batch_tokens: int,
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        config: Any = model.config
        self.dim = config.hidden_size * len(layers)
        self.tokens = TextTokens(tokenizer, config.vocab_size)
        if template == CHAT:
            before, after = chat_template(tokenizer, system, template_variables)
            self.template = Template(self.tokens, before, after, add_special_tokens=False)
        else:
            before, _, after = template.partition(SLOT)
            self.template = Template(self.tokens, before, after, add_special_tokens=True)
        self.segmenter = segmenter
        self.prefix, self.layers, self.lowercase = prefix, tuple(layers), lowercase
        self.max_tokens, self.overflow, self.max_batch_tokens = max_tokens, overflow, max_batch_tokens
        self.pad_to = pad_to
        (empty,) = self.template([""])
        if not self._kept_before(empty) + len(empty.after):
            raise ValueError(
                f"the template {template!r} with prefix '{prefix}' keeps no state of an empty prompt; keep a state of "
                "the template, e.g. with prefix 'all' and a text before the {}"
            )
        num_tokens, positions = len(empty.before) + len(empty.after), config.max_position_embeddings
        if max_tokens + num_tokens > positions:
            raise ValueError(
                f"max_tokens {max_tokens} and the {num_tokens} tokens of the template exceed the model's {positions} "
                f"positions; set max_tokens to at most {positions - num_tokens}"
            )
        dropped = len(empty.before) - self._kept_before(empty)
        if pad_to is not None and pad_to + dropped > positions:
            raise ValueError(
                f"pad_to {pad_to} exceeds the model's {positions} positions; set it to at most {positions - dropped}"
            )
        last = config.num_hidden_layers
        if missing := [layer for layer in layers if not -last - 1 <= layer <= last]:
            raise ValueError(
                f"layer {missing[0]} does not exist in a model of {last} layers; set layer to values from "
                f"{-last - 1} to {last}"
            )

    @classmethod
    def from_config(cls, config: LlmConfig, runtime: Runtime) -> LlmEncoder:
        """Loads the language model and its tokenizer, and builds the segmenter. Code of the checkpoint is not run.

        Raises:
            ValueError: if the checkpoint does not exist or is incomplete, or the settings do not fit the model or its
                tokenizer; see the class.
        """
        checkpoint = resolve_checkpoint(config.checkpoint)
        folder, tokenizer_folder = subfolders(checkpoint, config.subfolder, config.revision)
        model = load_frozen_model(
            AutoModel, checkpoint, folder, config.revision, runtime, config.variant, trust_remote_code=False
        )
        return cls(
            getattr(model, "language_model", model),  # without a vision-language model's vision tower
            load_tokenizer(checkpoint, tokenizer_folder, config.revision),
            None if config.segmenter is None else config.segmenter.build(runtime),
            template=config.template,
            system=config.system,
            template_variables=config.template_variables,
            prefix=config.prefix,
            layers=config.layers,
            lowercase=config.lowercase,
            max_tokens=config.max_tokens,
            pad_to=config.pad_to,
            overflow=config.overflow,
            max_batch_tokens=config.max_batch_tokens,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        plans = self._plans(prompts)
        reports = tuple(map(self._report, plans))
        advice = "raise max_tokens, or set a segmenter, e.g. 'sentence'"
        raise_or_warn_truncated(reports, self.overflow, f"{self.max_tokens} tokens", advice)
        passes = [self._passes(plan) for plan in plans]
        states, row_starts = run_grouped(
            self._run,
            [ids for prompt in passes for ids, _ in prompt],
            pad_id=_PADDING,
            device=device_of(self.model),
            max_batch_tokens=self.max_batch_tokens,
        )
        starts = iter(row_starts)
        indices = [torch.cat([torch.tensor(kept) + next(starts) for _, kept in prompt]) for prompt in passes]
        index = torch.stack(pad_with_last(indices))
        padded = states[index.to(states.device)]
        if self.pad_to is not None:
            return Conditioning(padded, reports=reports)
        lengths = torch.tensor([len(kept) for kept in indices])
        mask = (torch.arange(index.shape[1]) < lengths[:, None]).to(states.device)
        return Conditioning(padded * mask[..., None], mask, reports=reports)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return list(map(self._report, self._plans(prompts)))

    def _run(self, ids: Tensor, _: Tensor) -> Tensor:
        is_padding, last = ids == _PADDING, self.layers == (-1,)
        output = self.model(
            input_ids=ids.masked_fill(is_padding, self.tokens.pad_id),
            attention_mask=(~is_padding).long(),
            use_cache=False,
            output_hidden_states=not last,
        )
        if last:
            return output.last_hidden_state
        return torch.cat([output.hidden_states[layer] for layer in self.layers], dim=-1)

    def _plans(self, prompts: Sequence[Prompt]) -> list[list[TemplateRow]]:
        """Returns the tokens of each prompt in the template: one row, or one row per segment."""
        passes = []
        for prompt in check_prompts(prompts):
            if self.segmenter is None:
                passes.append([plain_text(prompt)])
                continue
            segments = split(self.segmenter, prompt, self.tokens.count, self.max_tokens)
            passes.append([segment for segment in segments if segment.strip()] or [""])
        rows = iter(self.template([text.lower() if self.lowercase else text for texts in passes for text in texts]))
        return [[next(rows) for _ in texts] for texts in passes]

    def _passes(self, plan: Sequence[TemplateRow]) -> list[tuple[tuple[int, ...], list[int]]]:
        """Returns the ids of each pass of a prompt, and the positions whose states are kept."""
        rows = [(*row.before, *row.text.ids[: self._limit], *row.after) for row in plan]
        kept = [self._kept(plan, i) for i in range(len(plan))]
        missing = (self.pad_to or 0) - sum(map(len, kept))
        if missing > 0:
            padding = (_PADDING,) * missing
            if self.tokens.tokenizer.padding_side == "left":
                rows[0] = padding + rows[0]
                kept[0] = [*range(missing), *(position + missing for position in kept[0])]
            else:
                kept[-1] += range(len(rows[-1]), len(rows[-1]) + missing)
                rows[-1] += padding
        return list(zip(rows, kept, strict=True))

    @property
    def _limit(self) -> int:
        """Maximum number of a text's tokens that are encoded per row, without those of the template.

        Segments are never truncated: they were split to fit, except for a token that they may share with the template.
        """
        return self.max_tokens if self.segmenter is None else sys.maxsize

    def _kept_before(self, row: TemplateRow) -> int:
        """Returns the number of states of the template before the prompt that are kept."""
        return {"all": len(row.before), "first": min(1, len(row.before)), "none": 0}[self.prefix]

    def _kept(self, plan: Sequence[TemplateRow], index: int) -> list[int]:
        """Returns the positions in row ``index`` of a prompt whose states are kept."""
        row = plan[index]
        first = len(row.before)
        last = first + min(len(row.text), self._limit)
        before = range(self._kept_before(row) if index == 0 else 0)
        after = range(last, last + len(row.after) if index == len(plan) - 1 else last)
        return [*before, *range(first, last), *after]

    def _report(self, plan: Sequence[TemplateRow]) -> PromptReport:
        return report_passes([row.text for row in plan], self._limit)
