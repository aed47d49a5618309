"""Several encoders side by side: the paper's model is CLIP segments followed by adapted T5 (arXiv 2410.11817)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longalign.encoders.base import Conditioning, Encoder, PromptReport, check_prompts
from longalign.registry import encoders
from longalign.runtime import Runtime
from longalign.segment import Prompt

if TYPE_CHECKING:
    from longalign.encoders.configs import ConcatConfig


class ConcatEncoder(Encoder):
    """States of all parts one after the other: ``(b, n1 + n2 + ..., d)``.

    If any part has a mask the merged one is True for the states of parts without. At most one part may give a pooled
    embedding. A report keeps the parts' reports; its ``cut`` is what any of them left out.

    Args:
        parts: encoders whose states have one width.

    Raises:
        ValueError: if there is no part, or the widths differ.
    """

    def __init__(self, parts: Sequence[Encoder]):
        super().__init__()
        if not parts:
            raise ValueError("expected at least one part, got none")
        widths = [part.dim for part in parts]
        if len(set(widths)) > 1:
            raise ValueError(f"parts give states of widths {widths}; give the wider or narrower ones an adapter")
        self.parts = nn.ModuleList(parts)
        self.dim = widths[0]

    @classmethod
    def from_config(cls, config: ConcatConfig, runtime: Runtime) -> ConcatEncoder:
        """Builds the parts."""
        return cls([encoders.construct(part, runtime) for part in config.parts])

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        checked = check_prompts(prompts)
        return join([part.encode(checked) for part in self.parts])  # type: ignore[operator]

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        checked = check_prompts(prompts)
        reports = [part.report(checked) for part in self.parts]  # type: ignore[operator]
        return [merge_reports(of_one) for of_one in zip(*reports, strict=True)]


def merge_reports(reports: Sequence[PromptReport]) -> PromptReport:
    """One prompt's reports of several encoders as one: segments and tokens in order, distinct cuts on lines."""
    return PromptReport(
        tuple(segment for report in reports for segment in report.segments),
        tuple(count for report in reports for count in report.tokens),
        "\n".join(dict.fromkeys(report.truncated for report in reports if report.truncated)),
        tuple(reports),
    )


def join(conditioning: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of the same prompts as one, their states one after the other.

    Raises:
        ValueError: if more than one has a pooled embedding.
    """
    pooled = [c.pooled for c in conditioning if c.pooled is not None]
    if len(pooled) > 1:
        raise ValueError(f"{len(pooled)} parts give a pooled embedding, the denoiser takes one; leave one such part")
    mask = None
    if any(c.mask is not None for c in conditioning):
        masks = [
            torch.ones_like(c.states[..., 0], dtype=torch.bool) if c.mask is None else c.mask for c in conditioning
        ]
        mask = torch.cat(masks, dim=1)
    reports = ()
    if all(c.reports for c in conditioning):
        reports = tuple(merge_reports(of_one) for of_one in zip(*(c.reports for c in conditioning), strict=True))
    states = torch.cat([c.states for c in conditioning], dim=1)
    whole = Conditioning(states, mask, pooled[0] if pooled else None, reports)
    if any(type(c).at is not Conditioning.at for c in conditioning):
        return JoinedConditioning(whole.states, whole.mask, whole.pooled, whole.reports, tuple(conditioning))
    return whole


@dataclass(frozen=True)
class JoinedConditioning(Conditioning):
    """A joined conditioning of which some part depends on the timestep.

    Attributes:
        parts: the conditionings that were joined.
    """

    parts: tuple[Conditioning, ...] = ()

    def at(self, timestep: Tensor) -> Conditioning:
        return join([c.at(timestep) for c in self.parts])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        return replace(super().to(device, dtype), parts=tuple(c.to(device, dtype) for c in self.parts))

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        return replace(super().__getitem__(index), parts=tuple(c[index] for c in self.parts))
