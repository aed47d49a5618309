"""Config of the metric `vqa`. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.errors import ConfigProblem
from longalign.metrics.config import MetricConfig
from longalign.vlm.config import VLMConfig, check_template


class VqaConfig(MetricConfig):
    """Share of a prompt's yes/no questions that hold in the image, as answered by a vision-language model.

    A question holds if it and all questions that it depends on are answered with yes, as in DSG (Cho et al. 2024, arXiv
    2310.18235) and DPG-Bench (Hu et al. 2024, arXiv 2403.05135).
    """

    target: ClassVar[str] = "longalign.metrics.vqa.metric:VqaMetric"

    name: Literal["vqa"] = "vqa"
    questions: str
    """csv file in the layout of DSG-1k and DPG-Bench, with the columns ``item_id``, ``text`` (the prompt),
    ``proposition_id``, ``dependency``, ``category_broad`` and ``question_natural_language``.
    """
    vlm: VLMConfig
    """the vision-language model: ``checkpoint`` of a local model, or ``base_url`` and ``model`` of an endpoint."""
    prompt: str = "{question} Answer with yes or no."
    """text for the vision-language model. ``{question}`` is replaced by the question."""
    scoring: Literal["corrected", "official"] = "corrected"
    """``"official"`` reproduces two errors of DPG-Bench's script: it drops the first question of the csv, and its
    category scores use only the last sample of an image that is a grid of samples. ``"corrected"`` does neither.
    """
    grid: int = Field(1, ge=1)
    """number of samples of the prompt per side of an image file: 1 for one sample per file; 2 for a grid of 2 by 2
    samples, as in DPG-Bench.
    """
    cache: str | None = "~/.cache/longalign/vqa"
    """folder in which answers are stored, so that an interrupted evaluation resumes; null: answers are not stored."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        return check_template(prompt, "{question}")

    def check_files(self) -> list[ConfigProblem]:
        problems = [(f"vlm.{key}", problem) for key, problem in self.vlm.check_files()]
        if not Path(self.questions).is_file():
            problems.insert(0, ("questions", f"no file {self.questions}; expected a csv file of questions"))
        return problems
