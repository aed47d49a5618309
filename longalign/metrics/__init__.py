"""Metrics: numbers that describe generated images, for ``longalign eval``. Public names are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.metrics.base import Metric as Metric
    from longalign.metrics.base import Value as Value
    from longalign.metrics.base import as_metric as as_metric
    from longalign.metrics.config import DiversityConfig as DiversityConfig
    from longalign.metrics.config import FactsConfig as FactsConfig
    from longalign.metrics.config import FrechetConfig as FrechetConfig
    from longalign.metrics.config import GaugesConfig as GaugesConfig
    from longalign.metrics.config import MetricConfig as MetricConfig
    from longalign.metrics.config import RetrievalConfig as RetrievalConfig
    from longalign.metrics.config import RewardMetricConfig as RewardMetricConfig
    from longalign.metrics.diversity import Diversity as Diversity
    from longalign.metrics.facts import FactMetric as FactMetric
    from longalign.metrics.frechet import Frechet as Frechet
    from longalign.metrics.gauges import Gauges as Gauges
    from longalign.metrics.retrieval import Retrieval as Retrieval
    from longalign.metrics.reward import RewardMetric as RewardMetric
    from longalign.metrics.vqa.config import VqaConfig as VqaConfig
    from longalign.metrics.vqa.metric import VqaMetric as VqaMetric

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Diversity": "diversity",
        "DiversityConfig": "config",
        "FactMetric": "facts",
        "FactsConfig": "config",
        "Frechet": "frechet",
        "FrechetConfig": "config",
        "Gauges": "gauges",
        "GaugesConfig": "config",
        "Metric": "base",
        "MetricConfig": "config",
        "Retrieval": "retrieval",
        "RetrievalConfig": "config",
        "RewardMetric": "reward",
        "RewardMetricConfig": "config",
        "Value": "base",
        "VqaConfig": "vqa.config",
        "VqaMetric": "vqa.metric",
        "as_metric": "base",
    },
)
