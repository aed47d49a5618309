"""Compares the images of two models pair by pair with a vision-language model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from longalign.evaluation.table import MetricTable
from longalign.metrics.base import Value
from longalign.runtime import Runtime
from longalign.vlm.base import HashedImage, Request
from longalign.vlm.config import JudgeConfig
from longalign.vlm.store import StoredAnswers

log = logging.getLogger(__name__)

OPTIONS = ("1", "2", "tie")
WIN_RATE = "win_rate"
VERDICTS = (WIN_RATE, f"{WIN_RATE}/verdict/tie", f"{WIN_RATE}/verdict/order")
UNITS = {WIN_RATE: Value("%"), f"{WIN_RATE}/verdict": Value("%", None)}


class Judge:
    """Decides with a vision-language model which of two images of a prompt is better.

    Each pair is shown in both orders, since such models favour one position (Zheng et al. 2023, arXiv 2306.05685,
    section 3.4). An image wins if it is preferred in both orders; every other outcome is a tie.

    Args:
        answers: the vision-language model, with a store of its earlier answers.
        prompt: text for the model, in which ``{prompt}`` stands for the prompt of the images. It must ask for the
            answer ``1``, ``2`` or ``tie``.
        batch_size: number of pairs of images in memory at a time.
    """

    def __init__(self, *, answers: StoredAnswers, prompt: str, batch_size: int = 32):
        self.answers, self.prompt, self.batch_size = answers, prompt, batch_size

    @classmethod
    def from_config(cls, config: JudgeConfig, runtime: Runtime) -> Judge:
        """Builds the judge with the vision-language model and the store of answers that ``config`` sets."""
        return cls(answers=StoredAnswers(config.vlm.build(runtime), config.cache), prompt=config.prompt)

    def compare(
        self, images: Tensor | Sequence[Tensor], others: Tensor | Sequence[Tensor], prompts: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Compares the images of ``images`` with those of ``others``.

        Args:
            images: ``n`` images ``(3, h, w)`` in [0, 1].
            others: ``n`` images to compare with, of the same or other sizes.
            prompts: the ``n`` prompts; the i-th images of ``images`` and ``others`` have the i-th prompt.

        Returns:
            Arrays ``(n,)``, with NaN where one of the model's two replies is not ``1``, ``2`` or ``tie``. ``win_rate``:
            1 where the image of ``images`` wins, 0 where it loses, 0.5 for a tie. ``win_rate/verdict/tie``: 1 for a
            tie, else 0. ``win_rate/verdict/order``: 1 for a tie in which the model chose the same position in both
            orders, else 0.

        Raises:
            ValueError: if the numbers of images and prompts differ.
        """
        if not len(images) == len(others) == len(prompts):
            raise ValueError(
                f"expected two images per prompt, got {len(images)} and {len(others)} images and {len(prompts)} prompts"
            )
        rows: list[tuple[float, float, float]] = []
        for start in range(0, len(prompts), self.batch_size):
            requests: list[Request] = []
            for i in range(start, min(start + self.batch_size, len(prompts))):
                text, first, second = self.prompt.replace("{prompt}", prompts[i]), images[i], others[i]
                pair = HashedImage.of(first), HashedImage.of(second)
                requests += [Request(text, pair, OPTIONS), Request(text, pair[::-1], OPTIONS)]
            replies = self.answers.ask(requests)
            rows += [_verdict(*pair) for pair in zip(replies[::2], replies[1::2], strict=True)]
        values = np.array(rows, dtype=np.float64).reshape(len(prompts), 3)
        if unread := int(np.isnan(values[:, 0]).sum()):
            log.warning("%d of %d pairs have no verdict: the reply is not 1, 2 or tie", unread, len(prompts))
        return dict(zip(VERDICTS, values.T, strict=True))


def add_win_rates(table: MetricTable, models: Mapping[str, Tensor | Sequence[Tensor]], judge: Judge) -> MetricTable:
    """Returns a copy of a metric table with the additional metric ``win_rate``, from comparisons with the first model.

    The win rate of the first model is set to 0.5 for each image, so that the paired difference of another model to it
    is this other model's win rate minus 0.5. Ties are added as submetrics, see `Judge.compare`.

    Args:
        table: the metric table of the models.
        models: name -> images ``(3, h, w)`` in [0, 1], in the order of the table's prompts. The first one is the model
            that the others are compared with.
        judge: compares the images.

    Raises:
        ValueError: if there is only one model.
    """
    base = next(iter(models))
    added = {
        name: judge.compare(images, models[base], table.prompts) for name, images in models.items() if name != base
    }
    if not added:
        raise ValueError(f"a judge compares models, got only '{base}'; give at least two")
    nothing = np.full(len(table.prompts), math.nan)
    added[base] = dict.fromkeys(VERDICTS, nothing) | {WIN_RATE: np.full(len(table.prompts), 0.5)}
    values = {name: {**table.values[name], **added[name]} for name in table.models}
    return replace(table, values=values, units={**table.units, **UNITS})


def _verdict(forward: str | None, backward: str | None) -> tuple[float, float, float]:
    """Returns the three values of `Judge.compare` for one pair.

    Args:
        forward: the answer for the order (first, second): "1", "2", "tie", or None if the reply is none of these.
        backward: the answer for the order (second, first).
    """
    if forward is None or backward is None:
        return math.nan, math.nan, math.nan
    same_position = float(forward == backward != "tie")
    win = {("1", "2"): 1.0, ("2", "1"): 0.0}.get((forward, backward), 0.5)
    return win, float(win == 0.5), same_position
