"""Configs of metrics and their base class. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.registry import PartConfig


class MetricConfig(PartConfig):
    """Base class of metric configs."""

    label: str | None = None
    """start of the metric's names in the table; null: the metric's own, such as the name of its reward. Set it if a
    table has the same metric twice.
    """


class GaugesConfig(MetricConfig):
    """Simple image statistics that show how a model's look drifts, e.g. to dark or oversaturated images."""

    target: ClassVar[str] = "longalign.metrics.gauges:Gauges"

    name: Literal["gauges"] = "gauges"
