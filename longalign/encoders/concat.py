"""Concatenation of encoders along the sequence axis, such as CLIP segments and adapted T5 (arXiv 2410.11817)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.config import ConcatConfig
from longalign.registry import encoders
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, check_prompts


class ConcatEncoder(Encoder):
    """Concatenates the states of several encoders along the sequence axis: ``(b, n1 + n2 + ..., d)``.

    If any encoder returns a mask, the merged mask is True for the states of encoders without a mask. At most one
    encoder may return a pooled embedding. `merge_reports` combines the reports of the encoders.

    Args:
        parts: encoders with states of equal width d.

    Raises:
        ValueError: if ``parts`` is empty, or the widths differ. ``encode`` raises it if several encoders return a
            pooled embedding.
    """

    def __init__(self, parts: Sequence[Encoder]):
        super().__init__()
        if not parts:
            raise ValueError("expected at least one part, an encoder, got none; add an encoder")
        widths = [part.dim for part in parts]
        if len(set(widths)) > 1:
            raise ValueError(
                f"expected encoders with states of equal width, got widths {widths}; use encoders of one width, or an "
                "adapter"
            )
        self.parts = nn.ModuleList(parts)
        self.dim = widths[0]

    @classmethod
    def from_config(
        cls, config: ConcatConfig, runtime: Runtime, parts: Sequence[Encoder] | None = None
    ) -> ConcatEncoder:
        """Returns a `ConcatEncoder` of ``parts``, encoders that are built already.

        If ``parts`` is None, the encoders are built from the configs in ``config.parts``.
        """
        return cls([encoders.construct(part, runtime) for part in config.parts] if parts is None else parts)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        checked = check_prompts(prompts)
        return join([part.encode(checked) for part in self.parts])  # type: ignore[operator]

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        checked = check_prompts(prompts)
        reports = [part.report(checked) for part in self.parts]  # type: ignore[operator]
        return [merge_reports(prompt_reports) for prompt_reports in zip(*reports, strict=True)]


def merge_reports(reports: Sequence[PromptReport]) -> PromptReport:
    """Merges the reports of one prompt from several encoders into one.

    Segments and token counts are concatenated, distinct truncated texts are joined with newlines, and
    `PromptReport.parts` holds the given reports.
    """
    return PromptReport(
        tuple(segment for report in reports for segment in report.segments),
        tuple(count for report in reports for count in report.tokens),
        "\n".join(dict.fromkeys(report.truncated for report in reports if report.truncated)),
        tuple(reports),
    )


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenates conditionings of the same prompts along the sequence axis: states ``(b, n1 + n2 + ..., d)``.

    If any conditioning has a mask, the merged mask is True for the states of conditionings without a mask. Returns a
    `JoinedConditioning` if any conditioning depends on the timestep, otherwise a plain `Conditioning`.

    Raises:
        ValueError: if more than one conditioning has a pooled embedding, or one of them combines several predictions
            of the denoiser (overrides `Conditioning.predict`).
    """
    pooled = [part.pooled for part in parts if part.pooled is not None]
    if len(pooled) > 1:
        raise ValueError(f"expected at most one encoder with a pooled embedding, got {len(pooled)}; remove the others")
    reports = ()
    if all(part.reports for part in parts):
        prompt_reports = zip(*(part.reports for part in parts), strict=True)
        reports = tuple(map(merge_reports, prompt_reports))
    if not all(part.is_static for part in parts):
        return _join_dynamic(parts, reports)
    mask = None
    if any(part.mask is not None for part in parts):
        masks = [
            torch.ones_like(part.states[..., 0], dtype=torch.bool) if part.mask is None else part.mask for part in parts
        ]
        mask = torch.cat(masks, dim=1)
    states = torch.cat([part.states for part in parts], dim=1)
    return Conditioning(states, mask, pooled[0] if pooled else None, reports)


def _join_dynamic(parts: Sequence[Conditioning], reports: tuple[PromptReport, ...]) -> JoinedConditioning:
    if combining := [type(part).__name__ for part in parts if type(part).predict is not Conditioning.predict]:
        raise ValueError(
            f"expected conditionings of one prediction per prompt, got a {combining[0]}, which combines several "
            "predictions; make 'concat' an inner encoder of the encoder that returns it"
        )
    unreported = tuple(replace(part, reports=()) for part in parts)
    return JoinedConditioning(parts[0].states[:, :0], reports=reports, parts=unreported)


@dataclass(frozen=True)
class JoinedConditioning(Conditioning):
    """Concatenation of conditionings of which at least one depends on the timestep.

    Read the states from the result of `at`, which concatenates those of all ``parts`` at the given timesteps. The
    attribute ``states`` is empty, ``(b, 0, d)``, since the parts may have different widths before `at`.

    Attributes:
        parts: the conditionings to concatenate, of the same prompts.
    """

    parts: tuple[Conditioning, ...] = ()

    def at(self, timestep: Tensor) -> Conditioning:
        return replace(join([part.at(timestep) for part in self.parts]), reports=self.reports)
