"""Writes the table and the report of an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign.ablation.cells import Run
from longalign.ablation.measure import measure_runs
from longalign.ablation.worker import IMAGES
from longalign.evaluation.report import Example, write_report
from longalign.evaluation.table import MetricTable
from longalign.image_folder import read_images
from longalign.image_io import load_image

NUM_EXAMPLES = 4
"""Prompts that the report shows with their images, the first ones."""


def write_results(
    output: Path, runs: Sequence[Run], seeds: Sequence[int], metrics: Sequence[Any], batch_size: int
) -> MetricTable:
    """Measures the finished runs and writes ``table.json``, ``table.csv``, ``table.md`` and ``report.html``."""
    table = measure_runs(runs, seeds, metrics, batch_size)
    (output / "table.json").write_text(table.json(), encoding="utf-8")
    (output / "table.csv").write_text(table.csv(), encoding="utf-8")
    (output / "table.md").write_text(table.markdown(), encoding="utf-8")
    first = {run.cell.name: run for run in reversed(runs)}  # the first training seed of each cell
    first = {name: first[name] for name in table.models}
    write_report(
        output / "report.html",
        title="Ablation",
        lead=f"{len(table.models)} cells, compared with the first one. {table.note} Images and curves are those of the "
        "first training seed.",
        table=table,
        examples=_examples(first),
        logs={name: run.folder / "train" / "log.jsonl" for name, run in first.items() if run.cell.trained},
        configs={name: run.config for name, run in first.items()},
    )
    return table


def _examples(runs: dict[str, Run]) -> list[Example]:
    rows = {name: read_images(run.folder / IMAGES)[:NUM_EXAMPLES] for name, run in runs.items()}
    shown = next(iter(rows.values()))
    return [
        Example([prompt], seed, {name: load_image(images[i][0]) for name, images in rows.items()})
        for i, (_, prompt, seed) in enumerate(shown)
    ]
