"""Interface of metrics: numbers that describe generated images, one for each image or one for a set of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

Observations = Mapping[str, np.ndarray]
"""What `Metric.observe` returned for all ``n`` images of a model: name -> ``(n,)`` or ``(n, d)``."""
Statistic = Callable[[Observations], float]
"""Computes one number from the observations of a set of images."""


@dataclass(frozen=True)
class Value:
    """How the values of a metric are shown and compared between models.

    Attributes:
        unit: e.g. ``"cosine"``; empty for a plain number. With ``"%"``, the metric returns fractions from 0 to 1, which
            are shown in percent.
        direction: whether ``"higher"`` or ``"lower"`` is better; None for values whose changes are neither gains nor
            losses, such as brightness.
    """

    unit: str = ""
    direction: Literal["higher", "lower"] | None = "higher"


def value_of(name: str, values: Mapping[str, Value]) -> Value:
    """Returns the `Value` for a name of a metric's values.

    If ``values`` does not contain the name, its longest start that ends before ``.`` or ``/`` is used: for ``a.b/c``
    ``a.b``, then ``a``. If there is none either, returns ``Value()``: no unit, higher is better.
    """
    starts = [known for known in values if name == known or name.startswith((f"{known}.", f"{known}/"))]
    return values[max(starts, key=len)] if starts else Value()


class Metric(nn.Module):
    """Base class of metrics, which measure all images of one model in three steps.

    1. `observe` is called once per batch. It reads the images and returns numbers for each, the observations.
    2. `finish` is called once with the observations of all images, and returns one value per image.
    3. `statistics` returns functions of the observations of a set of images, for values that no single image has.

    The table of ``longalign eval`` contains means and confidence intervals of the values. The interval of a statistic
    is computed by calling its function on bootstrap samples of the observations.

    Names of values start with the metric's `label`. A name without a slash, such as ``label`` or ``label.part``, is a
    column of the table. ``label/group/name`` is shown in a breakdown of ``label``. Names of two metrics of a table must
    differ.

    The values of a model do not depend on other models or on the batch size: the same images, prompts and seeds always
    have the same values. Submodules, such as rewards, move with ``to(device)``.
    """

    #: start of the names of the values, e.g. the name of the part
    label: str = ""
    #: unit of the values, and whether higher or lower is better, by name; see `value_of` for names that are not listed
    values: Mapping[str, Value] = {}

    def observe(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Any]:
        """Returns the observations of a batch of b images: name -> tensor or array ``(b,)`` or ``(b, d)``.

        Called under ``torch.no_grad``. NaN means that an image has no value. A name that is missing in one batch but
        not in others counts as NaN for the images of this batch. Infinite numbers are errors.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1]; batches may differ in height and width.
            prompts: the ``b`` prompts, one for each image.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement observe")

    def finish(self, observations: Observations, prompts: Sequence[str], seeds: Sequence[int]) -> Observations:
        """Returns one value per image: name -> ``(n,)``, NaN where an image has no value.

        The default returns those observations that have the shape ``(n,)``. Override this method if the value of an
        image depends on the other images or prompts, as for retrieval and diversity.

        Args:
            observations: name -> ``(n,)`` or ``(n, d)``: the results of `observe` for all ``n`` images of one model.
            prompts: the prompt of each image; images of one prompt have different seeds.
            seeds: the seed of each image; empty if unknown.
        """
        return {name: rows for name, rows in observations.items() if rows.ndim == 1}

    def statistics(self) -> Mapping[str, Statistic]:
        """Returns functions for the values of a whole set of images: name -> function, e.g. a distance between sets.

        Each function maps observations to one number. It is called with the observations of all images, and with those
        of resampled images, among which an image may occur several times. The default returns no functions.
        """
        return {}

    def value(self, name: str) -> Value:
        """Returns the `Value` for the name of a value: its unit, and whether higher or lower is better."""
        return value_of(name, self.values)


class CallableMetric(Metric):
    """Metric of a function that maps images ``(b, 3, h, w)`` in [0, 1] and b prompts to ``{name: (b,)}``."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Any]):
        super().__init__()
        self.function = function
        self.label = getattr(function, "__name__", type(function).__name__)

    def observe(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Any]:
        return self.function(images, prompts)


def as_metric(part: Any) -> Metric:
    """Returns a `Metric` for a metric or a function.

    Args:
        part: a `Metric`, which is returned unchanged, or a function that maps images ``(b, 3, h, w)`` in [0, 1] and b
            prompts to ``{name: (b,)}``.

    Raises:
        ValueError: if ``part`` is neither a metric nor a function.
    """
    if isinstance(part, Metric):
        return part
    if not callable(part):
        raise ValueError(
            f"expected a Metric or a function (images, prompts) -> values, got {part!r}; pass one of these"
        )
    return CallableMetric(part)
