"""Encoding with the hidden states of a language model, as Qwen-Image, Z-Image and Sana need."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


class LlmEncoder(Encoder):
    """Encodes prompts, each inside a template, with a frozen language model.

    ``prefix`` selects which states of the template before the prompt are kept; those after the prompt are always kept.
    With a segmenter, each segment is encoded separately in the template. The states of the segments are then
    concatenated; template states are kept only before the first and after the last segment. A batch is padded to the
    longest prompt, with a mask. The model is causal, so a prompt's states do not depend on the padding.

    Args:
        model: a causal transformers model without a head, e.g. a ``Qwen3Model``.
        tokenizer: the model's fast tokenizer.
        segmenter: splits a prompt into segments; None encodes the whole prompt.
        template: ``"chat"`` for the tokenizer's chat template, or a text with ``{}`` in place of the prompt.
        system: system message for the chat template; None for that of the chat template, if any.
        prefix: which states of the template before the prompt are kept: ``"all"``, ``"first"`` or ``"none"``.
        layer: layer whose states are used, counted from the end: -1 for the last one, after the final normalization.
        lowercase: whether prompts are converted to lower case.
        max_tokens: maximum number of tokens of the prompt, or of a segment, per forward pass, without the template's.
        overflow: what to do with longer prompts without a segmenter: ``"truncate"`` truncates with a warning,
            ``"error"`` raises.
        max_batch_tokens: maximum number of tokens, including template and padding, per call of the model.

    Raises:
        ValueError: if the chat template cannot be used, no state of an empty prompt would be kept, ``max_tokens`` plus
            the tokens of the template exceed the model's positions, or the model has no such ``layer``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        segmenter: Segmenter | None,
        *,
        template: str,
        system: str | None,
        prefix: Literal["all", "first", "none"],
        layer: int,
        lowercase: bool,
        max_tokens: int,
        overflow: Literal["truncate", "error"],
        max_batch_tokens: int,
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        config: Any = model.config
        self.dim = config.hidden_size
        self.tokens = TextTokens(tokenizer, config.vocab_size)
        if template == CHAT:
            self.template = Template(self.tokens, *chat_template(tokenizer, system), add_special_tokens=False)
        else:
            before, _, after = template.partition(SLOT)
            self.template = Template(self.tokens, before, after, add_special_tokens=True)
        self.segmenter = segmenter
        self.prefix, self.layer, self.lowercase = prefix, layer, lowercase
        self.max_tokens, self.overflow, self.max_batch_tokens = max_tokens, overflow, max_batch_tokens
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
        if -layer > config.num_hidden_layers + 1:
            raise ValueError(
                f"layer {layer} does not exist in a model of {config.num_hidden_layers} layers; set layer to a value "
                f"from {-config.num_hidden_layers - 1} to -1"
            )

    @classmethod
    def from_config(cls, config: LlmConfig, runtime: Runtime) -> LlmEncoder:
        """Loads the language model and its tokenizer, and builds the segmenter. Code of the checkpoint is not run.

        Raises:
            ValueError: if the checkpoint does not exist or is incomplete, or does not fit the settings.
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
            prefix=config.prefix,
            layer=config.layer,
            lowercase=config.lowercase,
            max_tokens=config.max_tokens,
            overflow=config.overflow,
            max_batch_tokens=config.max_batch_tokens,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        plans = self._plans(prompts)
        reports = tuple(map(self._report, plans))
        advice = "raise max_tokens, or set a segmenter, e.g. 'sentence'"
        raise_or_warn_truncated(reports, self.overflow, f"{self.max_tokens} tokens", advice)
        rows = [(*row.before, *row.text.ids[: self._limit], *row.after) for plan in plans for row in plan]
        states, row_starts = run_grouped(
            self._run,
            rows,
            pad_id=self.tokens.pad_id,
            device=device_of(self.model),
            max_batch_tokens=self.max_batch_tokens,
        )
        starts = iter(row_starts)
        indices = []
        for plan in plans:
            spans = [torch.tensor(self._kept(plan, i)) + next(starts) for i in range(len(plan))]
            indices.append(torch.cat(spans))
        index = torch.stack(pad_with_last(indices))
        lengths = torch.tensor([len(kept) for kept in indices])
        mask = (torch.arange(index.shape[1]) < lengths[:, None]).to(states.device)
        return Conditioning(states[index.to(states.device)] * mask[..., None], mask, reports=reports)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return list(map(self._report, self._plans(prompts)))

    def _run(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids, attention_mask=attention_mask.long(), use_cache=False, output_hidden_states=self.layer != -1
        )
        return output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]

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
