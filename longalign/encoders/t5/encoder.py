"""Encoding of the whole prompt with T5 and a trainable adapter (LongAlign, arXiv 2410.11817, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from longalign.encoders.adapter import Adapter
from longalign.encoders.base import (
    GROW_ADVICE,
    Conditioning,
    Encoder,
    PromptReport,
    raise_or_warn_truncated,
    report_passes,
)
from longalign.encoders.bucketing import CALL_COST
from longalign.encoders.frozen import device_of, pad_with_last, run_grouped
from longalign.encoders.loading import load_text_model
from longalign.encoders.t5.config import T5Config
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, check_prompts, plain_text
from longalign.tokens import TextTokens, Tokenized


class T5Encoder(Encoder):
    """Encodes the whole prompt with a frozen T5 encoder and an optional adapter.

    Prompts are padded to ``max_tokens``. With ``mask=False``, as in the published model, T5 and the denoiser attend to
    the padding. If the longest prompt of a batch has more than ``max_tokens`` states, shorter prompts are padded
    further by repeating their last state; apart from that, the states of a prompt do not depend on the batch. With
    ``overflow="grow"``, a prompt longer than ``window`` is encoded in windows of whole sentences, each with an
    end-of-text token, and the states are concatenated.

    Args:
        model: a transformers ``T5EncoderModel``.
        tokenizer: the model's fast tokenizer.
        adapter: trainable map from T5's states to the denoiser's width; None returns T5's states.
        max_tokens: number of states, including that of the end-of-text token, to which shorter prompts are padded.
        overflow: what to do with prompts of more than ``max_tokens`` tokens: ``"grow"`` pads the batch to the longest
            prompt, ``"truncate"`` truncates with a warning, ``"error"`` raises.
        window: maximum number of tokens per forward pass, including the end-of-text token; a value below
            ``max_tokens`` is raised to ``max_tokens``. Attention memory is quadratic in ``window``. T5 was trained with
            512.
        mask: where padding is masked. True: in T5 and in the conditioning, whose masked states are zero; ``"t5"``: only
            in T5; False: in neither.
        max_batch_tokens: maximum number of tokens, including padding, per call of the model.
        length_key: name of the config key that sets ``max_tokens``, for messages about truncation.

    Raises:
        ValueError: if the adapter's input width does not match T5's width.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        adapter: Adapter | None,
        *,
        max_tokens: int,
        overflow: Literal["grow", "truncate", "error"],
        window: int,
        mask: bool | Literal["t5"],
        max_batch_tokens: int,
        length_key: str = "max_tokens",
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        config: Any = model.config
        if adapter is not None and adapter.in_dim != config.d_model:
            raise ValueError(
                f"expected an adapter with in_dim={config.d_model}, the width of this T5, got {adapter.in_dim}; use a "
                "matching adapter"
            )
        self.adapter = adapter
        self.dim = config.d_model if adapter is None else adapter.out_dim
        self.tokens = TextTokens(tokenizer, config.vocab_size)
        self.max_tokens, self.overflow, self.mask, self.max_batch_tokens = max_tokens, overflow, mask, max_batch_tokens
        self.window = max(window, max_tokens)
        self.length_key = length_key

    @classmethod
    def from_config(cls, config: T5Config, runtime: Runtime) -> T5Encoder:
        """Loads the model and tokenizer, and loads or initializes the adapter.

        Raises:
            ValueError: if a checkpoint does not exist or is incomplete, or the adapter's width does not match T5's.
        """
        model, tokenizer = load_text_model(T5EncoderModel, config, config.subfolder, runtime)
        adapter = None if config.adapter is None else config.adapter.build(runtime)
        return cls.from_modules(config, model, tokenizer, adapter)

    @classmethod
    def from_modules(
        cls,
        config: T5Config,
        model: nn.Module,
        tokenizer: Any,
        adapter: Adapter | None,
        *,
        length_key: str = "max_tokens",
    ) -> T5Encoder:
        """Builds the encoder from loaded modules, with the settings of a config.

        See the class for ``model``, ``tokenizer``, ``adapter`` and ``length_key``.
        """
        return cls(
            model,
            tokenizer,
            adapter,
            max_tokens=config.max_tokens,
            overflow=config.overflow,
            window=config.window,
            mask=config.mask,
            max_batch_tokens=config.max_batch_tokens,
            length_key=length_key,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        texts = self._texts(prompts)
        reports = tuple(self._report(passes) for passes in texts)
        limit = f"{self.max_tokens} tokens"
        raise_or_warn_truncated(reports, self.overflow, limit, GROW_ADVICE.format(self.length_key))
        tokenizer = self.tokens.tokenizer
        rows = [[(*text.ids[: self._max_pass_tokens], tokenizer.eos_token_id) for text in passes] for passes in texts]
        lengths = torch.tensor([sum(map(len, prompt_rows)) for prompt_rows in rows])
        if self.mask is not True:  # the states of the padding are returned
            rows = [
                [row + (tokenizer.pad_token_id,) * (self.max_tokens - len(row)) for row in prompt_rows]
                if len(prompt_rows) == 1
                else prompt_rows
                for prompt_rows in rows
            ]
        device = device_of(self.model)
        states, row_starts = run_grouped(
            self._run,
            [row for prompt_rows in rows for row in prompt_rows],
            pad_id=tokenizer.pad_token_id,
            device=device,
            max_batch_tokens=self.max_batch_tokens,
            call_cost=CALL_COST if self.mask else 0,
        )
        starts = iter(row_starts)
        indices = [torch.cat([torch.arange(len(row)) + next(starts) for row in prompt_rows]) for prompt_rows in rows]
        index = torch.stack(pad_with_last(indices, self.max_tokens))
        conditioning = Conditioning(states[index.to(device)], reports=reports)
        if self.mask is True:
            mask = (torch.arange(index.shape[1]) < lengths[:, None]).to(device)
            conditioning = replace(conditioning, states=conditioning.states * mask[..., None], mask=mask)
        return conditioning if self.adapter is None else self.adapter.adapt(conditioning)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return [self._report(passes) for passes in self._texts(prompts)]

    def _run(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        # texts contain no padding tokens; rows may be padded already, which attention_mask does not show
        mask = (ids != self.tokens.tokenizer.pad_token_id).long() if self.mask else None
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    def _texts(self, prompts: Sequence[Prompt]) -> list[list[Tokenized]]:
        """Returns the texts of each prompt, one per forward pass."""
        texts = [plain_text(prompt) for prompt in check_prompts(prompts)]
        return self.tokens.split_into_passes(texts, self.window - 1 if self.overflow == "grow" else None)

    @property
    def _max_pass_tokens(self) -> int:
        """Returns the maximum number of encoded tokens per pass, without the end-of-text token."""
        return (self.window if self.overflow == "grow" else self.max_tokens) - 1

    def _report(self, passes: Sequence[Tokenized]) -> PromptReport:
        return report_passes(passes, self._max_pass_tokens)
