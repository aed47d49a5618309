"""Configs of metrics and their base class. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.registry import Part, PartConfig


class MetricConfig(PartConfig):
    """Base class of metric configs."""

    label: str | None = None
    """start of the metric's names in the table; null: the metric's own, such as the name of its reward. Set it if a
    table has the same metric twice.
    """


class RewardMetricConfig(MetricConfig):
    """The score of a reward; of an embedding reward also its text-relevant and text-irrelevant parts and Denscore-O."""

    target: ClassVar[str] = "longalign.metrics.reward:RewardMetric"

    name: Literal["reward"] = "reward"
    reward: Part("rewards")
    """the reward."""
    segments: bool = False
    """whether to add the mean and the lowest score of the prompt's segments, which are sentences unless the reward
    splits prompts in another way.
    """


class FactsConfig(MetricConfig):
    """Fact accuracy on the synthetic scenes, by attribute, place and position in the prompt. Needs no model."""

    target: ClassVar[str] = "longalign.metrics.facts:FactMetric"

    name: Literal["facts"] = "facts"
    data: Part("data") = "scenes"
    """the data `scenes` whose captions are the prompts, with its seed and size."""


class GaugesConfig(MetricConfig):
    """Simple image statistics that show how a model's look drifts, e.g. to dark or oversaturated images."""

    target: ClassVar[str] = "longalign.metrics.gauges:Gauges"

    name: Literal["gauges"] = "gauges"
