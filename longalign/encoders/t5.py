"""T5's encoder over the whole prompt in one pass, with a trainable adapter (LongAlign, arXiv 2410.11817, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from longalign.encoders.adapter import TextAdapter, adapt
from longalign.encoders.base import Conditioning, Encoder, PromptReport, check_prompts, handle_cuts, plain_text
from longalign.encoders.tokens import TextTokens, Tokenized, device_of, run_grouped
from longalign.runtime import Runtime
from longalign.segment import CALL_COST, Prompt

if TYPE_CHECKING:
    from longalign.encoders.configs import T5Config


class T5Encoder(Encoder):
    """Frozen T5 encoder states of the whole prompt, mapped by an adapter if there is one.

    As published, a prompt is padded to ``max_tokens`` and nothing is masked: T5 and the denoiser attend to the padding.
    A prompt's states never depend on the rest of the batch. Where the batch grows beyond ``max_tokens`` the last state
    of a shorter prompt is repeated up to the length of the longest.

    Args:
        model: a transformers ``T5EncoderModel``.
        tokenizer: its fast tokenizer.
        adapter: maps the states to the denoiser's width; its parameters are the trainable ones. None leaves them.
        max_tokens: number of states, the end-of-text token included.
        overflow: a longer prompt is an ``"error"``, is ``"cut"`` with a warning, or lets the batch ``"grow"``.
        mask: whether padding is masked, in T5 and in the conditioning (whose masked states are zero).
        max_batch_tokens: most positions in one call of the model.

    Raises:
        ValueError: if the adapter does not take states of T5's width.
    """

    #: what messages call `max_tokens`, for encoders that hold this one
    setting = "max_tokens"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        adapter: TextAdapter | None = None,
        *,
        max_tokens: int = 240,
        overflow: Literal["error", "cut", "grow"] = "cut",
        mask: bool = False,
        max_batch_tokens: int = 16384,
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        config: Any = model.config
        if adapter is not None and adapter.in_dim != config.d_model:
            raise ValueError(f"the adapter takes states of width {adapter.in_dim}, this T5's are {config.d_model} wide")
        self.adapter = adapter
        self.dim = config.d_model if adapter is None else adapter.out_dim
        self.tokens = TextTokens(tokenizer, config.vocab_size)
        self.max_tokens, self.overflow, self.mask, self.max_batch_tokens = max_tokens, overflow, mask, max_batch_tokens

    @classmethod
    def from_config(cls, config: T5Config, runtime: Runtime) -> T5Encoder:
        """Loads model and tokenizer, and loads or makes the adapter."""
        from transformers import T5EncoderModel

        from longalign.encoders.loading import load_text_model

        model, tokenizer = load_text_model(T5EncoderModel, config, config.subfolder, runtime)
        adapter = None if config.adapter is None else TextAdapter.from_config(config.adapter, runtime)
        keys = ("max_tokens", "overflow", "mask", "max_batch_tokens")
        return cls(model, tokenizer, adapter, **{key: getattr(config, key) for key in keys})

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        texts = self._texts(prompts)
        reports = tuple(self._report(text) for text in texts)
        advice = f"raise {self.setting}, or set overflow to 'cut' or 'grow'"
        handle_cuts(reports, self.overflow, self.max_tokens, advice)
        tokenizer = self.tokens.tokenizer
        rows = [(*text.ids[: self._num_read(text)], tokenizer.eos_token_id) for text in texts]
        real = torch.tensor([len(row) for row in rows])
        padded = rows if self.mask else [row + (tokenizer.pad_token_id,) * (self.max_tokens - len(row)) for row in rows]
        device = device_of(self.model)
        states, first = run_grouped(
            self._run,
            padded,
            pad_id=tokenizer.pad_token_id,
            device=device,
            max_batch_tokens=self.max_batch_tokens,
            call_cost=CALL_COST if self.mask else 0,
        )
        length = max(self.max_tokens, *(len(row) for row in padded))
        last = torch.tensor([[len(row) - 1] for row in padded])
        index = torch.tensor(first)[:, None] + torch.minimum(torch.arange(length), last)
        told = Conditioning(states[index.to(device)], reports=reports)
        if self.mask:
            mask = (torch.arange(length) < real[:, None]).to(device)
            told = replace(told, states=told.states * mask[..., None], mask=mask)
        return told if self.adapter is None else adapt(self.adapter, told)

    def cut(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return [self._report(text) for text in self._texts(prompts)]

    def _run(self, ids: Tensor, real: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=real.long() if self.mask else None).last_hidden_state

    def _texts(self, prompts: Sequence[Prompt]) -> list[Tokenized]:
        return self.tokens.batch([plain_text(prompt) for prompt in check_prompts(prompts)])

    def _num_read(self, text: Tokenized) -> int:
        return len(text) if self.overflow == "grow" else min(len(text), self.max_tokens - 1)

    def _report(self, text: Tokenized) -> PromptReport:
        num_read = self._num_read(text)
        read, unread = text.split(num_read)
        return PromptReport((read,) if num_read else (), (num_read,) if num_read else (), unread)
