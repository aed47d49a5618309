"""The metric `vqa`: share of a prompt's yes/no questions that hold in the image."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from longalign.metrics.base import Metric, Observations, Statistic, Value
from longalign.metrics.vqa.config import VqaConfig
from longalign.metrics.vqa.questions import Question, normalize, read_questions, vqa_score
from longalign.runtime import Runtime
from longalign.vlm.base import HashedImage, Request
from longalign.vlm.store import StoredAnswers

log = logging.getLogger(__name__)

OPTIONS = ("yes", "no")


class VqaMetric(Metric):
    """Share of a prompt's yes/no questions that hold in the image, as answered by a vision-language model.

    A question holds if it and all questions that it depends on (its parents, their parents and so on) are answered with
    yes. A reply that is neither yes nor no counts as no. An image may be a grid of several samples of the prompt, as in
    DPG-Bench. The values are:

    - ``<label>``, for each image: the share of questions that hold, averaged over the samples of the grid.
    - ``<label>/category/<category>``, over all images: the share of the category's questions that are answered with
      yes. As in DPG-Bench's script, parents do not matter here, and each question has the same weight.

    Args:
        label: name of the values in the table.
        questions: prompt with single spaces -> its questions, from `read_questions`.
        answers: the vision-language model, with a store of its answers.
        prompt: text for the model, with ``{question}`` for the question.
        official: whether to reproduce DPG-Bench's script; see `vqa_score`. Category scores then use only the last
            sample of a grid.
        grid: number of samples per side of an image: 1 for one sample, 2 for a grid of 2 by 2.
    """

    def __init__(
        self,
        *,
        label: str,
        questions: Mapping[str, Sequence[Question]],
        answers: StoredAnswers,
        prompt: str,
        official: bool,
        grid: int,
    ):
        super().__init__()
        self.label, self.questions, self.answers = label, questions, answers
        self.vlm = answers.vlm  # moves with the metric
        self.prompt, self.official, self.grid = prompt, official, grid
        self.categories = sorted({q.category for of_prompt in questions.values() for q in of_prompt})
        self.values = {label: Value("%")}

    @classmethod
    def from_config(cls, config: VqaConfig, runtime: Runtime) -> VqaMetric:
        """Builds the metric: reads the questions, and loads the vision-language model that answers them."""
        official = config.scoring == "official"
        questions = read_questions(config.questions, official)
        answers = StoredAnswers(config.vlm.build(runtime), config.cache)
        return cls(
            label=config.prefix(),
            questions=questions,
            answers=answers,
            prompt=config.prompt,
            official=official,
            grid=config.grid,
        )

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the scores ``(b,)``, and ``(b, 2)`` for each category: the numbers of yes answers and of questions.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            prompts: the b prompts.

        Raises:
            ValueError: if a prompt has no questions, or height or width is not divisible by ``grid``.
        """
        of_prompts = [self._questions(prompt) for prompt in prompts]
        samples = [_samples(image, self.grid) for image in images]
        requests = [
            Request(self.prompt.replace("{question}", question.text), (sample,), OPTIONS)
            for questions, of_image in zip(of_prompts, samples, strict=True)
            for sample in of_image
            for question in questions
        ]
        replies = self.answers.ask(requests)
        if unread := replies.count(None):
            log.warning("%d of %d replies are neither yes nor no; they count as no", unread, len(replies))
        replies = iter(replies)
        rows = [
            self._row(questions, [{q.number: next(replies) == "yes" for q in questions} for _ in of_image])
            for questions, of_image in zip(of_prompts, samples, strict=True)
        ]
        return {name: np.array([row[name] for row in rows]) for name in (self.label, *self._category_names())}

    def statistics(self) -> dict[str, Statistic]:
        """Returns name of a value -> function, one per category: the share of its questions answered with yes."""
        return {name: partial(_share, name) for name in self._category_names()}

    def _questions(self, prompt: str) -> Sequence[Question]:
        questions = self.questions.get(normalize(prompt))
        if questions is None:
            raise ValueError(
                f"the metric's questions file has no questions for the prompt {prompt[:200]!r}; add rows with this "
                "prompt in the column 'text', or evaluate only prompts that the file contains"
            )
        return questions

    def _row(self, questions: Sequence[Question], answers: Sequence[Mapping[int, bool]]) -> dict[str, object]:
        """Returns the observations of one image.

        Args:
            questions: the questions of the prompt.
            answers: for each sample in the image, question number -> whether the answer is yes.
        """
        score = float(np.mean([vqa_score(questions, yes, self.official) for yes in answers]))
        row: dict[str, object] = {self.label: score}
        counted = answers[-1:] if self.official else answers
        for category, name in zip(self.categories, self._category_names(), strict=True):
            values = [yes[q.number] for yes in counted for q in questions if q.category == category]
            row[name] = (0, 0) if math.isnan(score) else (sum(values), len(values))
        return row

    def _category_names(self) -> list[str]:
        return [f"{self.label}/category/{category}" for category in self.categories]


def _share(name: str, observations: Observations) -> float:
    yes, asked = observations[name].sum(0)
    return float(yes / asked) if asked else math.nan


def _samples(image: Tensor, grid: int) -> list[HashedImage]:
    """Divides an image ``(3, h, w)`` into ``grid * grid`` samples, row by row."""
    height, width = image.shape[1:]
    if height % grid or width % grid:
        raise ValueError(
            f"expected an image size divisible by grid={grid}, got {width} by {height} pixels; correct `grid`"
        )
    rows = image.split(height // grid, dim=1)
    return [HashedImage.of(sample) for row in rows for sample in row.split(width // grid, dim=2)]
