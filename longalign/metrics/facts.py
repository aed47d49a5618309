"""Fact accuracy on the synthetic scenes, read from the pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from longalign import registry
from longalign.metrics.base import Metric, Observations, Value
from longalign.metrics.config import FactsConfig
from longalign.mini import oracle
from longalign.names import natural_key
from longalign.runtime import Runtime


class FactMetric(Metric):
    """Fact accuracy: the fraction of the facts in a caption of the synthetic scenes that hold in the image.

    A fact is e.g. the colour of the object at one place; it is read from the pixels, without a learned model. The
    values are ``<label>``, and the breakdowns ``<label>/attribute/<kind>``, ``<label>/place/<place>`` and
    ``<label>/by_position/<n>-<m>%``. The last is for the facts of the sentences between n% and m% of the caption's
    sentences.

    Args:
        captions: captions of type `longalign.mini.captions.Caption`. A prompt is looked up by its text; captions are
            read only until it is found.
        label: name of the values in the table.
        quarters: number of equal ranges of positions in the caption.
    """

    def __init__(self, captions: Iterable[Any], label: str = "facts", quarters: int = 4):
        super().__init__()
        self.label, self.quarters = label, quarters
        self.values = {label: Value("%")}
        self._captions = iter(captions)
        self._known: dict[str, Any] = {}

    @classmethod
    def from_config(cls, config: FactsConfig, runtime: Runtime) -> FactMetric:
        data = registry.data.construct(config.data, runtime)
        if not hasattr(data, "scene"):
            raise ValueError(f"'{config.data.name}' has no captions with facts; set `data` to the data `scenes`")
        return cls((data.scene(i)[1] for i in range(len(data))), config.prefix())

    def caption(self, prompt: str) -> Any:
        """Returns the `longalign.mini.captions.Caption` whose text is the prompt, or None if there is none."""
        while prompt not in self._known and (caption := next(self._captions, None)) is not None:
            self._known.setdefault(caption.text, caption)
        return self._known.get(prompt)

    def verdicts(self, images: Tensor, prompts: Sequence[str]) -> list[list[list[bool]]]:
        """Returns whether each fact of a prompt holds in its image: nested lists image -> sentence -> fact -> bool.

        Args:
            images: ``(b, 3, 64, 64)`` in [0, 1].
            prompts: the prompt of each image.

        Raises:
            ValueError: if a prompt is not among the captions, or the images are not 64 by 64 pixels.
        """
        missing = [p for p in prompts if self.caption(p) is None]
        if missing:
            raise ValueError(
                f"no facts for {len(missing)} prompts, e.g. {missing[0]!r}; expected prompts that are among the "
                f"{len(self._known)} captions of the scenes; set the metric's `data` to the config that the prompts "
                "come from"
            )
        return oracle.verdicts(images.float().cpu().numpy(), [self.caption(p) for p in prompts])

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        rows = [
            self._accuracies(self.caption(prompt), verdict)
            for prompt, verdict in zip(prompts, self.verdicts(images, prompts), strict=True)
        ]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}

    def finish(self, observations: Observations, prompts: Sequence[str], seeds: Sequence[int]) -> Observations:
        return {name: observations[name] for name in sorted(observations, key=_order)}

    def _accuracies(self, caption: Any, verdict: list[list[bool]]) -> dict[str, float]:
        shown_by_name: dict[str, list[bool]] = {}
        for i, (sentence, facts_shown) in enumerate(zip(caption.sentences, verdict, strict=True)):
            part = i * self.quarters // len(caption.sentences)
            position = f"{100 * part // self.quarters}-{100 * (part + 1) // self.quarters}%"
            for fact, shown in zip(sentence.facts, facts_shown, strict=True):
                groups = [f"/attribute/{fact.kind}", f"/by_position/{position}"]
                groups += [f"/place/{fact.place}"] if fact.place else []
                for name in ("", *groups):
                    shown_by_name.setdefault(self.label + name, []).append(shown)
        return {name: float(np.mean(values)) for name, values in shown_by_name.items()}


def _order(name: str) -> tuple[str, tuple[int, int, str]]:
    group, _, last = name.rpartition("/")
    return group, natural_key(last)
