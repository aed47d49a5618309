"""Tokens of texts with their places in the text, and frozen text models run over rows of tokens in groups of length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longalign.segment import CALL_COST, group_by_length

_REMEMBERED = 1_000_000
"""Characters and tokens together of the texts that are remembered: about 80 MB."""


@dataclass(frozen=True)
class Tokenized:
    """A text and its tokens, without special tokens.

    Attributes:
        text: the text.
        ids: token ids.
        starts: where in the text each token begins.
    """

    text: str
    ids: tuple[int, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, num_tokens: int) -> tuple[str, str]:
        """The text of the first ``num_tokens`` tokens and the text after them."""
        if num_tokens >= len(self.ids):
            return self.text, ""
        at = self.starts[num_tokens]
        return self.text[:at].rstrip(), self.text[at:]


class TextTokens:
    """A transformers tokenizer as a function from text to `Tokenized`. It remembers the texts it has seen lately.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocab_size: rows of the text model's embedding.

    Raises:
        ValueError: if the tokenizer is a slow one, or has ids that the text model has no embedding for.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed")
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= vocab_size:
            raise ValueError(
                f"the tokenizer ends a text with id {tokenizer.eos_token_id}, the text model has {vocab_size} "
                "embeddings; they do not belong together, load both from one checkpoint"
            )
        self.tokenizer = tokenizer
        self._seen: dict[str, Tokenized] = {}
        self._size = 0

    def __call__(self, text: str) -> Tokenized:
        return self.batch([text])[0]

    def count(self, text: str) -> int:
        """Number of tokens of a text; the token counter that segmenters take."""
        return len(self(text))

    def batch(self, texts: Sequence[str]) -> list[Tokenized]:
        """Tokens of several texts in one call of the tokenizer."""
        found = {text: self._seen[text] for text in texts if text in self._seen}
        new = list(dict.fromkeys(text for text in texts if text not in found))
        if new:
            read = self.tokenizer(
                new, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
            )
            for text, ids, offsets in zip(new, read["input_ids"], read["offset_mapping"], strict=True):
                found[text] = Tokenized(text, tuple(ids), tuple(start for start, _ in offsets))
                self._remember(found[text])
        return [found[text] for text in texts]

    def _remember(self, read: Tokenized) -> None:
        size = len(read.text) + len(read)
        if self._size + size > _REMEMBERED:
            self._seen.clear()
            self._size = 0
        if size <= _REMEMBERED:
            self._seen[read.text] = read
            self._size += size


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its input: where its weights are, or where accelerate's offloading moves them to run."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    moved_to = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
    return torch.device(moved_to[0]) if moved_to else device


def own_precision(device: torch.device) -> torch.autocast:
    """Inside, a frozen model has the precision that it was loaded in, also where an adapter is trained in another: its
    states are those that a cache holds, and T5 in half precision keeps the layers in float32 that it needs so."""
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def run_grouped(
    run: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[tuple[int, ...]],
    *,
    pad_id: int,
    device: torch.device,
    max_batch_tokens: int,
    call_cost: int = CALL_COST,
) -> tuple[Tensor, list[int]]:
    """Runs a frozen text model over rows of tokens: equal rows once, rows of like length together.

    Args:
        run: takes ids ``(r, l)`` and a bool mask ``(r, l)`` of what is not padding; returns states ``(r, l, d)``.
        rows: token ids, special ones included; none is empty.
        pad_id: fills the shorter rows of a group up to its longest; this is exact for a causal model, and for others
            if ``run`` masks.
        device: where the model is.
        max_batch_tokens: most positions, padding included, in one call of ``run`` (one row always goes through).
        call_cost: see `longalign.segment.group_by_length`; 0 never pads.

    Returns:
        All states ``(m, d)``, and for each row the position of its first state among them.
    """
    unique = list(dict.fromkeys(rows))
    calls = group_by_length(list(map(len, unique)), limit=max_batch_tokens, call_cost=call_cost)
    groups = [[unique[i] for i in call] for call in calls]
    ids, real, first, shapes = [], [], {}, []
    for group in groups:
        length = len(group[-1])
        shapes.append((len(group), length))
        for row in group:
            first[row] = len(ids)
            ids += [*row, *[pad_id] * (length - len(row))]
            real += [True] * len(row) + [False] * (length - len(row))
    # one copy to the device for all groups
    sizes = [r * length for r, length in shapes]
    all_ids = torch.tensor(ids).to(device, non_blocking=True).split(sizes)
    all_real = torch.tensor(real).to(device, non_blocking=True).split(sizes)
    with own_precision(device):
        states = [run(i.view(s), m.view(s)).flatten(0, 1) for i, m, s in zip(all_ids, all_real, shapes, strict=True)]
    return torch.cat(states), [first[row] for row in rows]
