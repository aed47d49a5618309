"""Metrics of images, metric tables and the HTML report. Public names are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.evaluation.bootstrap import Interval as Interval
    from longalign.evaluation.comparison import findings as findings
    from longalign.evaluation.judge import Judge as Judge
    from longalign.evaluation.judge import add_win_rates as add_win_rates
    from longalign.evaluation.metrics import DecomposedMetric as DecomposedMetric
    from longalign.evaluation.metrics import FactMetric as FactMetric
    from longalign.evaluation.metrics import RewardMetric as RewardMetric
    from longalign.evaluation.metrics import evaluate as evaluate
    from longalign.evaluation.metrics import measure as measure
    from longalign.evaluation.metrics import reward_metrics as reward_metrics
    from longalign.evaluation.report import Example as Example
    from longalign.evaluation.report import write_report as write_report
    from longalign.evaluation.scoring import score_images as score_images
    from longalign.evaluation.scoring import score_sentences as score_sentences
    from longalign.evaluation.table import MetricTable as MetricTable

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DecomposedMetric": "metrics",
        "Example": "report",
        "FactMetric": "metrics",
        "Interval": "bootstrap",
        "Judge": "judge",
        "MetricTable": "table",
        "add_win_rates": "judge",
        "RewardMetric": "metrics",
        "evaluate": "metrics",
        "findings": "comparison",
        "measure": "metrics",
        "reward_metrics": "metrics",
        "score_images": "scoring",
        "score_sentences": "scoring",
        "write_report": "report",
    },
)
