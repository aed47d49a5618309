"""Interface of text encoders, which turn prompts into the `Conditioning` of a denoiser."""

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
        segments: encoded texts, in order: the segments of the prompt, or one text per forward pass.
        tokens: number of tokens of each text in ``segments``, without special tokens such as ``<sot>`` and ``<eot>``.
        truncated: text dropped by truncation; empty if the whole prompt was encoded.
        parts: one report per inner encoder if the encoder combines several; empty for other encoders. The other fields
            merge those of all ``parts``; see `longalign.encoders.concat.merge_reports`.
    """

    segments: tuple[str, ...]
    tokens: tuple[int, ...]
    truncated: str = ""
    parts: tuple[PromptReport, ...] = ()


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of a denoiser for a batch of b prompts.

    A subclass may depend on the timestep (`at`), or combine several predictions of the denoiser (`predict`). Fields
    that a subclass adds may hold tensors of b rows, conditionings of b prompts, and tuples and dicts of both.

    Attributes:
        states: ``(b, n, d)`` hidden states for cross-attention: n vectors of width d per prompt, usually one per token.
        mask: ``(b, n)`` bool, True for states that are attended to. If None, all states are attended to.
        pooled: ``(b, p)``, one embedding of width p per prompt, as SDXL, SD 3 and FLUX.1 need; None if there is none.
        reports: one `PromptReport` per prompt, or empty.
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    reports: tuple[PromptReport, ...] = field(default=())

    def at(self, timestep: Tensor) -> Conditioning:
        """Returns the conditioning at the denoiser's timesteps ``(b,)``: here, this conditioning.

        Subclasses whose states depend on the timestep override this method.
        """
        return self

    def predict(self, call: Call, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the denoiser's prediction ``(b, c, h, w)``: here, from one call with ``self.at(timesteps)``.

        Subclasses that combine several predictions per prompt override this method; one call with more rows can
        compute all of them. Trainers and samplers treat the result as the output of the denoiser, with gradient.

        Args:
            call: runs the denoiser: maps latents ``(n, c, h, w)``, timesteps ``(n,)`` and a static conditioning of n
                prompts (see `is_static`) to a prediction ``(n, c, h, w)``.
            latents: ``(b, c, h, w)`` noisy latents.
            timesteps: ``(b,)`` timesteps of the denoiser.
        """
        return call(latents, timesteps, self.at(timesteps))

    @property
    def is_static(self) -> bool:
        """Whether the conditioning is equal at all timesteps, and a prediction is one call of the denoiser with it."""
        return type(self).at is Conditioning.at and type(self).predict is Conditioning.predict

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Returns a copy with ``function`` applied to every tensor, also in nested tuples, dicts and conditionings."""

        def apply(value: Any) -> Any:
            if isinstance(value, Conditioning):
                return value.map(function)
            return function(value) if isinstance(value, Tensor) else value

        return replace(self, **{entry.name: tree_map(apply, getattr(self, entry.name)) for entry in fields(self)})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Returns a copy on ``device`` and in ``dtype``. None keeps the present device or dtype.

        Only floating-point tensors are cast.
        """
        return self.map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Returns the conditioning of selected prompts.

        ``index`` is a slice, an integer tensor of prompt positions, or a bool tensor ``(b,)``.
        """
        rows: Sequence[int] = ()
        if self.reports:
            rows = torch.arange(len(self.reports))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        return replace(self.map(lambda x: x[index]), reports=tuple(self.reports[i] for i in rows))


#: a call of the denoiser, ``(latents, timesteps, conditioning) -> prediction``; see `Conditioning.predict`
Call = Callable[[Tensor, Tensor, Conditioning], Tensor]

GROW_ADVICE = "raise {}, or set overflow to 'grow'"
"""Argument ``advice`` of `raise_or_warn_truncated` for encoders with ``overflow="grow"``.

``{}`` stands for the config key of the maximum length.
"""


class TruncationWarning(UserWarning):
    """Warning that prompts were truncated, so that part of their text was not encoded."""


def report_passes(passes: Sequence[Tokenized], max_tokens: int) -> PromptReport:
    """Returns the report of a prompt that is encoded in one or more forward passes of the text model.

    Args:
        passes: the text and tokens of each pass.
        max_tokens: maximum number of tokens that are encoded per pass, without special tokens. Text of a pass beyond
            them is reported as truncated.
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
    """Raises ValueError, or issues one `TruncationWarning`, if any prompt was truncated.

    Args:
        reports: one report per prompt.
        overflow: ``"error"`` raises; any other value warns.
        limit: the maximum length for the message, e.g. "240 tokens".
        advice: end of the message: how to avoid truncation, as an imperative.
        stacklevel: passed to `warnings.warn`. If ``encode`` calls this function directly, the default points at the
            code that called ``encode``.

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
        raise ValueError(f"{message}. Shorten these prompts, or {advice}")
    warnings.warn(f"{message}. To avoid this, {advice}", TruncationWarning, stacklevel=stacklevel)


class Encoder(nn.Module):
    """Base class of text encoders, which turn a batch of prompts into a `Conditioning`.

    In subclasses, ``__init__`` receives loaded modules, and ``from_config(config, runtime)`` loads them. Frozen text
    models have ``requires_grad=False`` and run under ``torch.no_grad``. All other parameters belong to adapters:
    trainable modules that follow a text model.
    """

    #: width d of the states
    dim: int
    #: names of the parameters that `train_adapter` has frozen
    _frozen_adapter: tuple[str, ...] = ()

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Returns the conditioning of a batch of prompts. Gradient reaches the parameters of adapters only.

        Raises:
            ValueError: if ``prompts`` is a single text or empty, or if a prompt is too long and the encoder was built
                with ``overflow="error"``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement encode")

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        """Returns what `encode` would encode and truncate, one report per prompt, without running a model.

        Truncated prompts cause neither a warning nor an error.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement report")

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the adapters by name: all that require gradient or were frozen by `train_adapter`.

        Checkpoints contain these parameters even while they are frozen. Parameters that had ``requires_grad=False``
        when the encoder was built are excluded.
        """
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad or name in self._frozen_adapter
        }

    def train_adapter(self, trainable: bool) -> None:
        """Makes the `adapter_parameters` trainable if ``trainable`` is True, otherwise freezes them."""
        parameters = self.adapter_parameters()
        self._frozen_adapter = () if trainable else tuple(parameters)
        for parameter in parameters.values():
            parameter.requires_grad_(trainable)

    def train(self, mode: bool = True) -> Encoder:
        """Sets training mode, or eval mode if ``mode`` is False, and returns the encoder.

        Child modules without trainable parameters stay in eval mode, so that their dropout is disabled.
        """
        super().train(mode)
        for child in self.children():
            if not any(p.requires_grad for p in child.parameters()):
                child.eval()
        return self
