"""T5's encoder over the whole prompt in one pass, with a trainable adapter (LongAlign, arXiv 2410.11817, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from longalign.encoders.adapter import TextAdapter, adapt
from longalign.encoders.base import (
    GROW,
    Conditioning,
    Encoder,
    PromptReport,
    check_prompts,
    plain_text,
    raise_or_warn_truncated,
    report_passes,
)
from longalign.encoders.tokens import device_of, pad_with_last, run_grouped
from longalign.runtime import Runtime
from longalign.segment import CALL_COST, Prompt
from longalign.tokens import TextTokens, Tokenized

if TYPE_CHECKING:
    from longalign.encoders.configs import T5Config


class T5Encoder(Encoder):
    """Frozen T5 encoder states of the whole prompt, mapped by an adapter if there is one.

    As published, a prompt is padded to ``max_tokens`` and nothing is masked: T5 and the denoiser attend to the padding.
    A prompt's states never depend on the rest of the batch. Where the batch grows beyond ``max_tokens`` the last state
    of a shorter prompt is repeated up to the length of the longest. A prompt that is longer than a pass holds is read
    in windows of whole sentences, each with its end-of-text token, and their states follow one another.

    Args:
        model: a transformers ``T5EncoderModel``.
        tokenizer: its fast tokenizer.
        adapter: maps the states to the denoiser's width; its parameters are the trainable ones. None leaves them.
        max_tokens: number of states, the end-of-text token included; shorter prompts are padded up to it.
        overflow: a longer prompt lets the batch ``"grow"``, is ``"truncate"`` with a warning, or is an ``"error"``.
        window: most tokens in one pass, the end-of-text token included, if ``max_tokens`` is not more: attention needs
            memory with the square of this. 512 is the length that T5 was trained with.
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
        overflow: Literal["grow", "truncate", "error"] = "grow",
        window: int = 512,
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
        self.window = max(window, max_tokens)

    @classmethod
    def from_config(cls, config: T5Config, runtime: Runtime) -> T5Encoder:
        """Loads model and tokenizer, and loads or makes the adapter."""
        from transformers import T5EncoderModel

        from longalign.encoders.loading import load_text_model

        model, tokenizer = load_text_model(T5EncoderModel, config, config.subfolder, runtime)
        adapter = None if config.adapter is None else TextAdapter.from_config(config.adapter, runtime)
        keys = ("max_tokens", "overflow", "window", "mask", "max_batch_tokens")
        return cls(model, tokenizer, adapter, **{key: getattr(config, key) for key in keys})

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        texts = self._texts(prompts)
        reports = tuple(self._report(passes) for passes in texts)
        raise_or_warn_truncated(reports, self.overflow, self.max_tokens, GROW.format(self.setting))
        tokenizer = self.tokens.tokenizer
        rows = [[(*text.ids[: self._most], tokenizer.eos_token_id) for text in passes] for passes in texts]
        real = torch.tensor([sum(map(len, of_one)) for of_one in rows])
        if not self.mask:
            rows = [
                [row + (tokenizer.pad_token_id,) * (self.max_tokens - len(row)) for row in of_one]
                if len(of_one) == 1
                else of_one
                for of_one in rows
            ]
        device = device_of(self.model)
        states, first = run_grouped(
            self._run,
            [row for of_one in rows for row in of_one],
            pad_id=tokenizer.pad_token_id,
            device=device,
            max_batch_tokens=self.max_batch_tokens,
            call_cost=CALL_COST if self.mask else 0,
        )
        begins = iter(first)
        places = [torch.cat([torch.arange(len(row)) + next(begins) for row in of_one]) for of_one in rows]
        index = torch.stack(pad_with_last(places, self.max_tokens))
        length = index.shape[1]
        conditioning = Conditioning(states[index.to(device)], reports=reports)
        if self.mask:
            mask = (torch.arange(length) < real[:, None]).to(device)
            conditioning = replace(conditioning, states=conditioning.states * mask[..., None], mask=mask)
        return conditioning if self.adapter is None else adapt(self.adapter, conditioning)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return [self._report(passes) for passes in self._texts(prompts)]

    def _run(self, ids: Tensor, real: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=real.long() if self.mask else None).last_hidden_state

    def _texts(self, prompts: Sequence[Prompt]) -> list[list[Tokenized]]:
        """Of each prompt the texts that are read in one pass each."""
        texts = [plain_text(prompt) for prompt in check_prompts(prompts)]
        return self.tokens.in_passes(texts, self.window - 1 if self.overflow == "grow" else None)

    @property
    def _most(self) -> int:
        """Tokens of one pass that are read."""
        return (self.window if self.overflow == "grow" else self.max_tokens) - 1

    def _report(self, passes: Sequence[Tokenized]) -> PromptReport:
        return report_passes(passes, self._most)
