"""Interface of text encoders: prompts -> `Conditioning` for the denoiser."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from longalign.segmenters import Prompt
from longalign.tokens import Tokenized


@dataclass(frozen=True)
class PromptReport:
    """The encoded and the truncated text of one prompt.

    Attributes:
        segments: encoded texts, in order.
        tokens: number of tokens of each segment, without special tokens such as ``<sot>`` and ``<eot>``.
        truncated: text dropped by truncation; empty if the whole prompt was encoded.
        parts: reports of the inner encoders, if there are several; ``truncated`` joins the text dropped by any of them.
    """

    segments: tuple[str, ...]
    tokens: tuple[int, ...]
    truncated: str = ""
    parts: tuple[PromptReport, ...] = ()


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning passed to the denoiser.

    A subclass may depend on the timestep (`at`), or combine several predictions of the denoiser (`predict`). Its other
    fields may hold tensors of b rows, conditionings, and tuples and dicts of both.

    Attributes:
        states: ``(b, n, d)`` hidden states for cross-attention.
        mask: ``(b, n)`` bool, True for states that are attended to. If None, all states are attended to.
        pooled: ``(b, p)`` pooled embedding, or None.
        reports: one `PromptReport` per prompt; may be empty.
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    reports: tuple[PromptReport, ...] = field(default=())

    def at(self, timestep: Tensor) -> Conditioning:
        """Returns the conditioning at timesteps ``(b,)``. Override it if the conditioning depends on the timestep."""
        return self

    def predict(self, call: Call, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the denoiser's prediction ``(b, c, h, w)``: one call with the conditioning at the timesteps.

        Override it to combine several predictions for each prompt, in one call with more rows. Trainers and samplers
        treat the result as the output of the denoiser, with gradient.

        Args:
            call: maps latents ``(n, c, h, w)``, timesteps ``(n,)`` and a conditioning of n rows, which depends on no
                timestep, to the denoiser's prediction ``(n, c, h, w)``.
            latents: ``(b, c, h, w)`` noisy latents.
            timesteps: ``(b,)`` timesteps.
        """
        return call(latents, timesteps, self.at(timesteps))

    @property
    def is_static(self) -> bool:
        """Whether each prediction is one call of the denoiser with these states."""
        return type(self).at is Conditioning.at and type(self).predict is Conditioning.predict

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Returns a conditioning with ``function`` applied to all tensors, also in tuples, dicts and conditionings."""

        def apply(value: Any) -> Any:
            if isinstance(value, Conditioning):
                return value.map(function)
            return function(value) if isinstance(value, Tensor) else value

        return replace(self, **{entry.name: tree_map(apply, getattr(self, entry.name)) for entry in fields(self)})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Moves and casts the tensors; the mask keeps its dtype."""
        return self.map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Selects prompts by a slice, an index tensor or a bool tensor ``(b,)``."""
        rows: Sequence[int] = ()
        if self.reports:
            rows = torch.arange(len(self.reports))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        return replace(self.map(lambda x: x[index]), reports=tuple(self.reports[i] for i in rows))


#: ``(latents, timesteps, conditioning) -> prediction``, see `Conditioning.predict`
Call = Callable[[Tensor, Tensor, Conditioning], Tensor]

GROW_ADVICE = "raise {}, or set overflow to 'grow'"
"""Advice for `raise_or_warn_truncated` if ``overflow`` can be ``"grow"``; ``{}`` is the config key of the length."""


class TruncationWarning(UserWarning):
    """Warns that part of a prompt was not encoded."""


def report_passes(passes: Sequence[Tokenized], max_tokens: int) -> PromptReport:
    """Returns the report of a prompt that is encoded in one or more passes.

    Args:
        passes: text and tokens of each pass.
        max_tokens: number of tokens encoded in a pass; the rest of its text is reported as truncated.
    """
    parts = [(*text.split_at(max_tokens), min(len(text), max_tokens)) for text in passes]
    return PromptReport(
        tuple(encoded for encoded, _, count in parts if count),
        tuple(count for _, _, count in parts if count),
        " ".join(truncated for _, truncated, _ in parts if truncated),
    )


def raise_or_warn_truncated(
    reports: Sequence[PromptReport], overflow: str, limit: str, advice: str, stacklevel: int = 3
) -> None:
    """Raises an error or issues one warning if any prompt was truncated.

    Args:
        reports: one report per prompt.
        overflow: ``"error"`` raises; any other value warns.
        limit: the maximum length, e.g. "240 tokens"; used in the message.
        advice: advice to the user; used in the message.
        stacklevel: passed to `warnings.warn`; the default points at the caller of the encoder.

    Raises:
        ValueError: if a prompt was truncated and ``overflow`` is ``"error"``.
    """
    indices = [i for i, report in enumerate(reports) if report.truncated]
    if not indices:
        return
    message = (
        f"{len(indices)} of {len(reports)} prompts exceed {limit}; "
        f"text dropped from prompt {indices[0]}: {reports[indices[0]].truncated[:80]!r}"
    )
    if overflow == "error":
        raise ValueError(f"{message}. Shorten it, or {advice}")
    warnings.warn(f"{message}. To avoid this, {advice}", TruncationWarning, stacklevel=stacklevel)


class Encoder(nn.Module):
    """Base class of text encoders.

    In subclasses, ``__init__`` receives loaded modules, and ``from_config(config, runtime)`` loads them. Frozen text
    models have ``requires_grad=False`` and run under ``torch.no_grad``. All other parameters belong to adapters; see
    `adapter_parameters`.
    """

    #: width of the states
    dim: int
    #: names of the parameters that `train_adapter` has frozen
    _frozen_adapter: tuple[str, ...] = ()

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encodes a batch of prompts. Only adapters receive gradient.

        Raises:
            ValueError: if ``prompts`` is a single text or empty, or if a prompt is too long and ``overflow="error"``.
        """
        raise NotImplementedError

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        """Returns one report per prompt, without running a model.

        Does not warn about or reject truncated prompts.
        """
        raise NotImplementedError

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the adapters by name: all that require gradient or were frozen by `train_adapter`.

        Checkpoints contain these parameters even if they are not trained. Weights that were built frozen are excluded.
        """
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad or name in self._frozen_adapter
        }

    def train_adapter(self, trainable: bool) -> None:
        """Makes the `adapter_parameters` trainable, or freezes them."""
        parameters = self.adapter_parameters()
        self._frozen_adapter = () if trainable else tuple(parameters)
        for parameter in parameters.values():
            parameter.requires_grad_(trainable)

    def train(self, mode: bool = True) -> Encoder:
        """Sets training mode. Modules without trainable parameters stay in eval mode, so that dropout is disabled."""
        super().train(mode)
        for child in self.children():
            if not any(p.requires_grad for p in child.parameters()):
                child.eval()
        return self
