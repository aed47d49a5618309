"""The interface of text encoders: prompts in, a `Conditioning` for the denoiser out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longalign.segment import Prompt, check_prompts, plain_text
from longalign.tokens import Tokenized

__all__ = [
    "GROW",
    "Conditioning",
    "Encoder",
    "PromptReport",
    "TruncationWarning",
    "check_prompts",
    "equal_lengths",
    "plain_text",
    "raise_or_warn_truncated",
    "report_passes",
]


@dataclass(frozen=True)
class PromptReport:
    """What an encoder read of one prompt.

    Attributes:
        segments: the texts that were encoded, in order.
        tokens: number of tokens of each segment, without ``<sot>``/``<eot>`` or other special tokens.
        truncated: the text that was not encoded; empty if the whole prompt was.
        parts: the reports of the inner encoders where there are several; ``truncated`` joins what any of them dropped.
    """

    segments: tuple[str, ...]
    tokens: tuple[int, ...]
    truncated: str = ""
    parts: tuple[PromptReport, ...] = ()


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told.

    Attributes:
        states: ``(b, n, d)`` hidden states for cross-attention.
        mask: ``(b, n)`` bool, True where a state is to be attended, or None for all of them.
        pooled: ``(b, p)`` pooled embedding, or None where the denoiser takes none.
        reports: one `PromptReport` per prompt (empty where an encoder gives none).
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    reports: tuple[PromptReport, ...] = field(default=())

    def at(self, timestep: Tensor) -> Conditioning:
        """The conditioning at a timestep ``(b,)``. Encoders whose output depends on the timestep override this."""
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same conditioning with its tensors moved; the mask keeps its dtype."""
        return replace(
            self,
            states=self.states.to(device=device, dtype=dtype),
            mask=None if self.mask is None else self.mask.to(device=device),
            pooled=None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
        )

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Some prompts of the batch, by a slice, a tensor of positions or a bool tensor ``(b,)``."""
        rows: Sequence[int] = ()
        if self.reports:
            rows = torch.arange(len(self.reports))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        return replace(
            self,
            states=self.states[index],
            mask=None if self.mask is None else self.mask[index],
            pooled=None if self.pooled is None else self.pooled[index],
            reports=tuple(self.reports[i] for i in rows),
        )


def equal_lengths(*conditionings: Conditioning) -> tuple[Conditioning, ...]:
    """Fills shorter conditionings with masked zeros up to the longest one's number of states.

    All are returned as they are if their lengths agree; otherwise all have a mask. Encoding the prompts of both
    guidance branches in one call gives equal lengths without a mask.
    """
    lengths = [c.states.shape[1] for c in conditionings]
    if len(set(lengths)) < 2:
        return conditionings
    out = []
    for conditioning, length in zip(conditionings, lengths, strict=True):
        missing = max(lengths) - length
        mask = conditioning.mask
        if mask is None:
            mask = torch.ones(conditioning.states.shape[:2], dtype=torch.bool, device=conditioning.states.device)
        states = F.pad(conditioning.states, (0, 0, 0, missing))
        out.append(replace(conditioning, states=states, mask=F.pad(mask, (0, missing))))
    return tuple(out)


GROW = "raise {}, or set overflow to 'grow'"
"""Advice of encoders without a limit, for `raise_or_warn_truncated`; ``{}`` is the setting of their length."""


class TruncationWarning(UserWarning):
    """Part of a prompt was not encoded."""


def report_passes(passes: Sequence[Tokenized], most: int) -> PromptReport:
    """What of a prompt is read in passes of at most ``most`` tokens each."""
    read = [(*text.split(most), min(len(text), most)) for text in passes]
    return PromptReport(
        tuple(part for part, _, count in read if count),
        tuple(count for _, _, count in read if count),
        " ".join(unread for _, unread, _ in read if unread),
    )


def raise_or_warn_truncated(
    reports: Sequence[PromptReport], overflow: str, limit: int, advice: str, stacklevel: int = 3
) -> None:
    """Raises (``overflow="error"``) or warns, once, if any prompt was cut.

    Args:
        reports: one report per prompt.
        overflow: ``"error"`` or anything else.
        limit: the number of positions there are, for the message.
        advice: what the user can do.
        stacklevel: of the warning; the default is whoever called the caller.
    """
    cut = [i for i, report in enumerate(reports) if report.truncated]
    if not cut:
        return
    text = (
        f"{len(cut)} of {len(reports)} prompts do not fit into {limit} positions; "
        f"of prompt {cut[0]} this is not encoded: {reports[cut[0]].truncated[:80]!r}"
    )
    if overflow == "error":
        raise ValueError(f"{text}. Shorten it, or {advice}")
    warnings.warn(f"{text}. To avoid this {advice}", TruncationWarning, stacklevel=stacklevel)


class Encoder(nn.Module):
    """Base of text encoders.

    A concrete encoder takes ready modules in ``__init__`` and loads them in ``from_config(config, runtime)``. Frozen
    text models have ``requires_grad`` off and are run under ``torch.no_grad``; what is trained (an adapter) is the
    rest of the parameters, so ``[p for p in encoder.parameters() if p.requires_grad]`` is exactly the trainable part.
    """

    #: width of the states
    dim: int

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encodes a batch of prompts; gradient flows only into trainable parameters (adapters).

        Raises:
            ValueError: if ``prompts`` is a bare text or empty, or a prompt is too long and that is to be an error.
        """
        raise NotImplementedError

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        """What `encode` would read of each prompt, without running a model, warning or refusing."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Encoder:
        """Sets the mode; modules without trainable parameters stay in evaluation mode, so their dropout stays off."""
        super().train(mode)
        for child in self.children():
            if not any(p.requires_grad for p in child.parameters()):
                child.eval()
        return self
