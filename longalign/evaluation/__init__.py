"""Measures images, compares models in metric tables, writes the HTML report. Public names are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.evaluation.bootstrap import Interval as Interval
    from longalign.evaluation.comparison import findings as findings
    from longalign.evaluation.judge import Judge as Judge
    from longalign.evaluation.judge import add_win_rates as add_win_rates
    from longalign.evaluation.measure import evaluate as evaluate
    from longalign.evaluation.measure import measure as measure
    from longalign.evaluation.report import write_report as write_report
    from longalign.evaluation.report_examples import Example as Example
    from longalign.evaluation.scoring import score_images as score_images
    from longalign.evaluation.scoring import score_sentences as score_sentences
    from longalign.evaluation.table import MetricTable as MetricTable

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Example": "report_examples",
        "Interval": "bootstrap",
        "Judge": "judge",
        "MetricTable": "table",
        "add_win_rates": "judge",
        "evaluate": "measure",
        "findings": "comparison",
        "measure": "measure",
        "score_images": "scoring",
        "score_sentences": "scoring",
        "write_report": "report",
    },
)
