"""The interface of text encoders: prompts in, a `Conditioning` for the denoiser out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PromptReport:
    """What an encoder read of one prompt.

    Attributes:
        segments: the texts that were encoded, in order.
        tokens: number of tokens of each segment, without ``<sot>``/``<eot>`` or other special tokens.
        cut: the text that was not encoded, empty if all of it was.
    """

    segments: tuple[str, ...]
    tokens: tuple[int, ...]
    cut: str = ""


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
        """Some prompts of the batch."""
        rows = range(len(self.reports))[index] if isinstance(index, slice) else index.tolist()
        return replace(
            self,
            states=self.states[index],
            mask=None if self.mask is None else self.mask[index],
            pooled=None if self.pooled is None else self.pooled[index],
            reports=tuple(self.reports[i] for i in rows) if self.reports else (),
        )


class Encoder(nn.Module):
    """Base of text encoders.

    A concrete encoder takes ready modules in ``__init__`` and loads them in ``from_config(config, runtime)``. Frozen
    text models have ``requires_grad`` off and are run under ``torch.no_grad``; what is trained (an adapter) is the
    rest of the parameters, so ``[p for p in encoder.parameters() if p.requires_grad]`` is exactly the trainable part.
    """

    #: width of the states
    dim: int

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes a batch of prompts; gradient flows only into trainable parameters (adapters)."""
        raise NotImplementedError

    def cut(self, prompts: Sequence[str]) -> list[PromptReport]:
        """What `encode` would read of each prompt, without running a model."""
        raise NotImplementedError
