"""Averages the denoiser's predictions for the parts of a prompt (PRISM, arXiv 2604.18258)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from longalign import Runtime
from longalign.encoders import Conditioning, Encoder, PromptReport
from longalign.registry import encoders, segmenters
from longalign.segmenters import Prompt, Segmenter, check_prompts, split
from torch import Tensor

from longalign_prism.config import PrismConfig


@dataclass(frozen=True)
class ComposedConditioning(Conditioning):
    """Conditioning of b prompts. The prediction for a prompt is the mean of the predictions for its parts.

    The inherited ``states`` are empty, ``(b, 0, d)``.

    Attributes:
        parts: conditioning of the parts of all prompts, one row per part, those of the first prompt first.
        counts: number of parts of each prompt.
    """

    parts: Conditioning = field(kw_only=True)
    counts: tuple[int, ...] = field(kw_only=True)

    def predict(self, call: Any, latents: Tensor, timesteps: Tensor) -> Tensor:
        prompts = [prompt for prompt, count in enumerate(self.counts) for _ in range(count)]
        rows = torch.tensor(prompts).to(latents.device, non_blocking=True)
        outputs = self.parts.predict(call, latents[rows], timesteps[rows])
        return torch.stack([parts.mean(0) for parts in outputs.split(self.counts)])

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        prompts = torch.arange(len(self.counts))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        ends = list(accumulate(self.counts))
        rows = [row for i in prompts for row in range(ends[i] - self.counts[i], ends[i])]
        return replace(
            self,
            states=self.states[index],
            reports=tuple(self.reports[i] for i in prompts) if self.reports else (),
            parts=self.parts[torch.tensor(rows).to(self.states.device, non_blocking=True)],
            counts=tuple(self.counts[i] for i in prompts),
        )


class PrismEncoder(Encoder):
    """Splits prompts into parts, pieces of the text, and encodes each part as a prompt of its own.

    Args:
        inner: encodes the parts.
        segmenter: splits a prompt into its parts.
    """

    def __init__(self, inner: Encoder, segmenter: Segmenter):
        super().__init__()
        self.inner, self.segmenter, self.dim = inner, segmenter, inner.dim

    @classmethod
    def from_config(cls, config: PrismConfig, runtime: Runtime) -> PrismEncoder:
        """Builds the inner encoder and the segmenter."""
        return cls(encoders.construct(config.inner, runtime), segmenters.construct(config.segmenter, runtime))

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        parts = self._parts(prompts)
        encoded = self.inner.encode([text for texts in parts for text in texts])
        reports = tuple(self._merged(parts, encoded.reports)) if encoded.reports else ()
        return ComposedConditioning(
            encoded.states[: len(parts), :0],
            reports=reports,
            parts=replace(encoded, reports=()),
            counts=tuple(map(len, parts)),
        )

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        parts = self._parts(prompts)
        return list(self._merged(parts, self.inner.report([text for texts in parts for text in texts])))

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, without special tokens, as the encoder ``inner`` counts them.

        If ``inner`` combines several encoders, the first one counts.
        """
        (report,) = self.inner.report([text])
        while report.parts:
            report = report.parts[0]
        count = sum(report.tokens)
        return count + self.count_tokens(report.truncated) if count and report.truncated.strip() else count

    def _parts(self, prompts: Sequence[Prompt]) -> list[list[str]]:
        """Returns the parts of each prompt as texts; the empty prompt has one empty part."""
        return [split(self.segmenter, prompt, self.count_tokens) or [""] for prompt in check_prompts(prompts)]

    @staticmethod
    def _merged(parts: Sequence[Sequence[str]], reports: Sequence[PromptReport]) -> Iterator[PromptReport]:
        remaining = iter(reports)
        for texts in parts:
            own = [next(remaining) for _ in texts]
            yield PromptReport(
                tuple(segment for report in own for segment in report.segments),
                tuple(count for report in own for count in report.tokens),
                " ".join(report.truncated for report in own if report.truncated),
            )
