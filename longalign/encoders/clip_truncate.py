"""CLIP's text model over the whole prompt in one pass, cut at the window: the baseline, and LongCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from longalign.encoders.base import Conditioning, Encoder, PromptReport, check_prompts, handle_cuts, plain_text
from longalign.encoders.tokens import TextTokens, Tokenized, run_grouped
from longalign.runtime import Runtime
from longalign.segment import Prompt

if TYPE_CHECKING:
    from longalign.encoders.configs import ClipTruncateConfig


class ClipTruncateEncoder(Encoder):
    """What a diffusers pipeline does: last hidden state of the prompt, padded to the window and cut there.

    The window is the text model's number of positions: 77, or 248 for LongCLIP. States are ``(b, window, d)``; there is
    no mask, the padding is attended to as in Stable Diffusion.

    Args:
        text_model: a transformers ``CLIPTextModel``.
        tokenizer: its fast tokenizer; its pad token fills the window.
        overflow: a longer prompt is ``"cut"`` with a warning, or an ``"error"``.
        max_batch_tokens: most positions in one call of the text model.
    """

    def __init__(
        self,
        text_model: nn.Module,
        tokenizer: Any,
        *,
        overflow: Literal["cut", "error"] = "cut",
        max_batch_tokens: int = 16384,
    ):
        super().__init__()
        self.text_model = text_model.requires_grad_(False).eval()
        config: Any = text_model.config
        self.dim = config.hidden_size
        self.window: int = config.max_position_embeddings
        self.tokens = TextTokens(tokenizer, config.vocab_size)
        self.overflow, self.max_batch_tokens = overflow, max_batch_tokens

    @classmethod
    def from_config(cls, config: ClipTruncateConfig, runtime: Runtime) -> ClipTruncateEncoder:
        """Loads text model and tokenizer."""
        from transformers import CLIPTextModel

        from longalign.encoders.single_file import load_clip

        model, tokenizer = load_clip(CLIPTextModel, config, config.subfolder, runtime)
        return cls(model, tokenizer, overflow=config.overflow, max_batch_tokens=config.max_batch_tokens)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        texts = self._texts(prompts)
        reports = tuple(self._report(text) for text in texts)
        handle_cuts(reports, self.overflow, self.window, "use an encoder for long text, such as 'clip-segment'")
        tokenizer = self.tokens.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = []
        for text in texts:
            row = (tokenizer.bos_token_id, *text.ids[: self.window - 2], tokenizer.eos_token_id)
            rows.append(row + (pad_id,) * (self.window - len(row)))
        device = next(self.text_model.parameters()).device
        states, first = run_grouped(
            self._run, rows, pad_id=pad_id, device=device, max_batch_tokens=self.max_batch_tokens
        )
        index = torch.tensor(first)[:, None] + torch.arange(self.window)
        return Conditioning(states[index.to(device)], reports=reports)

    def cut(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return [self._report(text) for text in self._texts(prompts)]

    def _run(self, ids: Tensor, real: Tensor) -> Tensor:
        return self.text_model(input_ids=ids).last_hidden_state

    def _texts(self, prompts: Sequence[Prompt]) -> list[Tokenized]:
        return self.tokens.batch([plain_text(prompt) for prompt in check_prompts(prompts)])

    def _report(self, text: Tokenized) -> PromptReport:
        read, unread = text.split(self.window - 2)
        num_read = min(len(text), self.window - 2)
        return PromptReport((read,), (num_read,), unread) if num_read else PromptReport((), ())
