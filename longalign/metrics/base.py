"""Interface of metrics: values of generated images, one per image or one per set of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

Observations = Mapping[str, np.ndarray]
"""What `Metric.observe` returned for all ``n`` images of a model: name -> ``(n,)`` or ``(n, d)``."""
Statistic = Callable[[Observations], float]


@dataclass(frozen=True)
class Value:
    """How a value is shown and compared.

    Attributes:
        unit: e.g. ``"cosine"``; empty for a plain number. Values with ``"%"`` are fractions from 0 to 1, which are
            shown in percent.
        direction: whether higher or lower is better; None for a gauge, whose changes are neither gains nor losses.
    """

    unit: str = ""
    direction: Literal["higher", "lower"] | None = "higher"


def value_of(name: str, values: Mapping[str, Value]) -> Value:
    """Returns the entry of a name. Without one, ``a.b/c`` uses that of ``a.b``, then ``a``, else a plain `Value`."""
    starts = [known for known in values if name == known or name.startswith((f"{known}.", f"{known}/"))]
    return values[max(starts, key=len)] if starts else Value()


class Metric(nn.Module):
    """Base class of metrics. Measures all images of one model in three steps.

    1. `observe` is called once per batch and reads the images.
    2. `finish` is called once with the observations of all images, and returns one value per image.
    3. `statistics` are functions of the observations of a set of images, for values that no single image has.

    The table computes means and intervals of the values, and resamples the observations for the statistics.

    Names start with the metric's `label`. A name without a slash, such as ``label`` or ``label.part``, is a column of
    the table. ``label/group/name`` is shown in a breakdown of ``label``. Names of two metrics of a table must differ.

    A metric does not depend on other models: the same images, prompts and seeds always have the same values, in any
    batches. Modules and rewards assigned as attributes move with ``to(device)``.
    """

    #: start of the names in the table, e.g. the name of the part
    label: str = ""
    #: unit, and whether higher or lower is better, by name; see `value_of` for names that are not listed
    values: Mapping[str, Value] = {}

    def observe(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Any]:
        """Returns the observations of a batch: name -> tensor or array ``(b,)`` or ``(b, d)``.

        Called without gradient. A row contains NaN where an image has no value; a name that is missing in a batch
        counts as NaN. Infinities are errors.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1]; all images of a batch have one size.
            prompts: the ``b`` prompts.
        """
        raise NotImplementedError

    def finish(self, observations: Observations, prompts: Sequence[str], seeds: Sequence[int]) -> Observations:
        """Returns the values: name -> ``(n,)``, NaN where an image has no value.

        The default returns the observations of shape ``(n,)``. Override it for values that depend on the other images
        or prompts, such as retrieval and diversity.

        Args:
            observations: of all ``n`` images of one model.
            prompts: the ``n`` prompts; images of one prompt have different seeds.
            seeds: the ``n`` seeds; empty if unknown.
        """
        return {name: rows for name, rows in observations.items() if rows.ndim == 1}

    def statistics(self) -> Mapping[str, Statistic]:
        """Returns the values of a whole set: name -> function of the observations of any images, e.g. a distance.

        Each function is called with the observations of resampled images, where an image may occur several times. The
        default has none.
        """
        return {}

    def value(self, name: str) -> Value:
        """Returns the unit of a value, and whether higher or lower is better."""
        return value_of(name, self.values)


class CallableMetric(Metric):
    """Wraps a function ``(images, prompts) -> {name: (b,)}`` as a metric."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Any]):
        super().__init__()
        self.function = function
        self.label = getattr(function, "__name__", type(function).__name__)

    def observe(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Any]:
        return self.function(images, prompts)


def as_metric(part: Any) -> Metric:
    """Returns a metric unchanged, and wraps a function ``(images, prompts) -> {name: (b,)}``.

    Raises:
        ValueError: if ``part`` is neither.
    """
    if isinstance(part, Metric):
        return part
    if not callable(part):
        raise ValueError(
            f"expected a Metric or a function (images, prompts) -> values, got {part!r}; pass one of these"
        )
    return CallableMetric(part)
