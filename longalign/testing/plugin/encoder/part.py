"""The encoder `my-part`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from my_plugin.config import MyPartConfig
from torch import nn

from longalign.encoders import Conditioning, Encoder, PromptReport
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, check_prompts, plain_text

ROWS = 4096


class MyPart(Encoder):
    """Encodes prompts as states ``(b, n, width)``: one table row per word, then the table's last row as padding.

    Args:
        width: width of the states.
        min_states: minimum number n of states; all prompts of a batch are padded to the longest.
    """

    def __init__(self, *, width: int, min_states: int):
        super().__init__()
        self.dim, self.min_states = width, min_states
        table = torch.randn(ROWS + 1, width, generator=torch.Generator().manual_seed(0))
        self.table = nn.Embedding.from_pretrained(table, freeze=True)

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        """Builds the encoder. Load weights here."""
        return cls(width=config.width, min_states=config.min_states).to(runtime.device)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        texts = [plain_text(prompt).split() for prompt in check_prompts(prompts)]
        length = max([self.min_states, *map(len, texts)])
        rows = [[zlib.crc32(word.encode()) % ROWS for word in words] for words in texts]
        padded = [row + [ROWS] * (length - len(row)) for row in rows]
        with torch.no_grad():
            states = self.table(torch.tensor(padded, device=self.table.weight.device))
        return Conditioning(states, reports=tuple(self.report(prompts)))

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        texts = [plain_text(prompt) for prompt in check_prompts(prompts)]
        return [PromptReport((text,), (len(text.split()),)) if text.split() else PromptReport((), ()) for text in texts]
