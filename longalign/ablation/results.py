"""Writes the metric table and the report of an ablation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign.ablation.cells import Run
from longalign.ablation.measure import measure_runs
from longalign.data.prompts.sets import PromptSet
from longalign.evaluation.report import write_report
from longalign.evaluation.sources import read_sources
from longalign.evaluation.table import MetricTable

NUM_EXAMPLES = 4
"""Number of prompts that the report shows with their images, from the first."""


def write_results(
    output: Path,
    runs: Sequence[Run],
    seeds: Sequence[int],
    metrics: Sequence[Any],
    batch_size: int,
    prompts: PromptSet | None = None,
) -> MetricTable:
    """Measures the finished runs and writes ``table.json``, ``table.csv``, ``table.md`` and ``report.html``.

    ``output`` is the folder of the ablation, into which the files are written. It must contain ``ablation.json``, since
    the report is made from this folder as by ``longalign report``. The other arguments are as for `measure_runs`.
    Returns the metric table.
    """
    table = measure_runs(runs, seeds, metrics, batch_size, prompts)
    lead = (
        f"{len(table.models)} cells, compared with the first one. {table.note} Images are those of the first training "
        "seed."
    )
    (output / "table.json").write_text(json.dumps({**table.to_dict(), "lead": lead}, indent=1), encoding="utf-8")
    (output / "table.csv").write_text(table.csv(), encoding="utf-8")
    (output / "table.md").write_text(table.markdown(), encoding="utf-8")
    write_report(output / "report.html", **read_sources([str(output)], NUM_EXAMPLES))
    return table
