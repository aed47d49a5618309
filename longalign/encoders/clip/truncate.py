"""Encoding of the whole prompt with CLIP's text model, truncated to the window; base class of LongCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from longalign.encoders.base import (
    Conditioning,
    Encoder,
    PromptReport,
    raise_or_warn_truncated,
    report_passes,
)
from longalign.encoders.clip.config import ClipTruncateConfig
from longalign.encoders.clip.single_file import load_clip_text_model
from longalign.encoders.frozen import device_of, pad_with_last, run_grouped
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, check_prompts, plain_text
from longalign.tokens import TextTokens, Tokenized


class ClipTruncateEncoder(Encoder):
    """Encodes a prompt with CLIP's last hidden states, padded or truncated to the window, as in a diffusers pipeline.

    The window is the text model's number of positions: 77, or 248 for LongCLIP. States are ``(b, window, d)``, or
    ``(b, k * window, d)`` if a prompt of the batch is encoded in k windows. There is no mask: padding is attended to,
    as in Stable Diffusion.

    Args:
        text_model: a transformers ``CLIPTextModel``.
        tokenizer: the text model's fast tokenizer; its pad token pads the window.
        overflow: what to do with prompts longer than the window: ``"truncate"`` truncates with a warning, ``"error"``
            raises. ``"grow"`` encodes the prompt in windows of whole sentences and concatenates their states; shorter
            prompts of the batch are padded by repeating the last state.
        max_batch_tokens: maximum number of tokens, including padding, per call of the text model.
    """

    def __init__(
        self,
        text_model: nn.Module,
        tokenizer: Any,
        *,
        overflow: Literal["truncate", "error", "grow"],
        max_batch_tokens: int,
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
        """Loads the text model and tokenizer.

        Raises:
            FileNotFoundError: if the checkpoint is a single file that does not exist.
            ValueError: if the checkpoint does not exist or is incomplete.
        """
        model, tokenizer = load_clip_text_model(CLIPTextModel, config, config.subfolder, runtime, config.layout)
        return cls(model, tokenizer, overflow=config.overflow, max_batch_tokens=config.max_batch_tokens)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        texts = self._texts(prompts)
        reports = tuple(self._report(passes) for passes in texts)
        raise_or_warn_truncated(
            reports, self.overflow, f"{self.window} tokens", "use an encoder for long text, such as 'clip-segment'"
        )
        tokenizer, pad_id = self.tokens.tokenizer, self.tokens.pad_id
        rows = []
        for text in (text for passes in texts for text in passes):
            row = (tokenizer.bos_token_id, *text.ids[: self.window - 2], tokenizer.eos_token_id)
            rows.append(row + (pad_id,) * (self.window - len(row)))
        device = device_of(self.text_model)
        states, row_starts = run_grouped(
            self._run, rows, pad_id=pad_id, device=device, max_batch_tokens=self.max_batch_tokens
        )
        starts = iter(row_starts)
        indices = [torch.cat([torch.arange(self.window) + next(starts) for _ in passes]) for passes in texts]
        index = torch.stack(pad_with_last(indices))
        return Conditioning(states[index.to(device)], reports=reports)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        return [self._report(passes) for passes in self._texts(prompts)]

    def _run(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text_model(input_ids=ids).last_hidden_state

    def _texts(self, prompts: Sequence[Prompt]) -> list[list[Tokenized]]:
        """Returns the texts of each prompt, one per forward pass."""
        texts = [plain_text(prompt) for prompt in check_prompts(prompts)]
        return self.tokens.split_into_passes(texts, self.window - 2 if self.overflow == "grow" else None)

    def _report(self, passes: Sequence[Tokenized]) -> PromptReport:
        return report_passes(passes, self.window - 2)
