"""Measures the images of an ablation's runs, and merges the runs of each cell in one metric table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from longalign.ablation.cells import Cell, Run
from longalign.ablation.worker import IMAGES
from longalign.data.prompts.sets import PromptSet
from longalign.evaluation.bootstrap import block_counts
from longalign.evaluation.groups import all_labels
from longalign.evaluation.measure import evaluate
from longalign.evaluation.table import MetricTable
from longalign.image_folder import read_images
from longalign.image_io import ImageFiles

COVERAGE = {2: 50, 3: 75, 4: 81, 5: 87, 6: 89}
"""Number of training seeds -> percentage of cases in which the 95% interval contains the true mean, if values differ
only between training seeds. Measured on 10000 simulated sets of normal values per number; with 10 seeds it is 92%."""


def measure_runs(
    runs: Sequence[Run],
    seeds: Sequence[int],
    metrics: Sequence[Any],
    batch_size: int,
    prompts: PromptSet | None = None,
) -> MetricTable:
    """Measures the images of finished runs. Returns a table with one model per cell, see `merge`.

    Args:
        runs: the finished runs.
        seeds: the training seeds of the ablation.
        metrics: metrics or functions as for `longalign.evaluation.evaluate`.
        batch_size: number of images per call of a metric.
        prompts: the prompt set of the images, whose labels are added to the table; None adds no labels.
    """
    rows = {run: read_images(run.folder / IMAGES) for run in runs}
    first = rows[runs[0]]
    files = {str(i): ImageFiles([path for path, _, _ in rows[run]]) for i, run in enumerate(runs)}
    texts = [prompt for _, prompt, _ in first]
    table = evaluate(files, texts, metrics, [seed for _, _, seed in first], batch_size)
    if prompts is not None:
        table = replace(table, labels=all_labels(prompts, texts))
    trained = {str(i): (run.cell, run.seed) for i, run in enumerate(runs)}
    return merge(table, trained, seeds)


def merge(table: MetricTable, runs: Mapping[str, tuple[Cell, int | None]], seeds: Sequence[int]) -> MetricTable:
    """Merges a table with one model per run into a table with one model per cell, named by the cell.

    A `Cell` is a set of changes of the config that the ablation compares; one without training, such as the base model,
    has one run. The values of a cell are concatenated over training seeds, with NaN for a missing run. The values of a
    cell that is not trained are repeated for each training seed. Values that only a set of images has, such as a
    Frechet distance, are averaged over training seeds. In the result, each cell is compared with the first one only.

    Args:
        table: the values of each run.
        runs: name of a model of ``table`` -> its cell and training seed; the seed is None if the cell is not trained.
        seeds: the training seeds of the ablation; those without any run are omitted.
    """
    of = {(cell.name, seed): model for model, (cell, seed) in runs.items()}
    cells = {cell.name: cell for cell, _ in runs.values()}
    used = [s for s in seeds if any(seed == s for _, seed in runs.values())] or list(seeds[:1])
    models = {name: [of.get((name, s if cell.trained else None)) for s in used] for name, cell in cells.items()}
    values = {name: _joined(table.values, of_seeds, len(table.prompts)) for name, of_seeds in models.items()}
    sets = {name: _averaged(table.sets, of_seeds) for name, of_seeds in models.items()}
    several = len(used) > 1
    return MetricTable(
        values,
        list(table.prompts) * len(used),
        list(table.seeds) * len(used),
        table.units,
        sets,
        training_seeds=list(np.repeat(used, len(table.prompts)).tolist()) if several else (),
        neighbours=False,
        labels={name: list(rows) * len(used) for name, rows in table.labels.items()},
        note=seed_note(len(used)) if any(cell.trained for cell in cells.values()) else "",
    )


def _joined(
    values: Mapping[str, Mapping[str, np.ndarray]], models: Sequence[str | None], count: int
) -> dict[str, np.ndarray]:
    missing = np.full(count, np.nan)
    rows = [values[model] if model is not None else {} for model in models]
    return {m: np.concatenate([row.get(m, missing) for row in rows]) for m in dict.fromkeys(m for r in rows for m in r)}


def _averaged(sets: Mapping[str, Mapping[str, np.ndarray]], models: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Returns the values of sets of images averaged over training seeds, as name of a metric -> ``(1 + samples,)``.

    The average of each bootstrap sample weights the training seeds as `block_counts` samples them.

    Args:
        sets: name of a model -> name of a metric -> ``(1 + samples,)``, see `MetricTable`.
        models: the model of each training seed; None for a missing run.
    """
    rows = [sets[model] if model is not None else {} for model in models]
    out = {}
    for metric in dict.fromkeys(m for row in rows for m in row):
        size = next(len(row[metric]) for row in rows if metric in row)
        stacked = np.stack([row.get(metric, np.full(size, np.nan)) for row in rows])
        counts = np.concatenate([np.ones((1, len(rows))), block_counts(len(rows), size - 1)]).T
        weights = np.where(np.isnan(stacked), 0, counts)
        with np.errstate(invalid="ignore"):  # no run in the sample: NaN, skipped
            out[metric] = (np.nan_to_num(stacked) * weights).sum(0) / weights.sum(0)
    return out


def seed_note(count: int) -> str:
    """Returns a note for the caption of a table: what its intervals cover with this number of training seeds."""
    if count == 1:
        return "One training seed: the intervals do not cover the variation between trainings."
    if count in COVERAGE:
        return (
            f"Intervals resample training seeds and prompts. With {count} training seeds, 95% intervals contain the "
            f"true value in only {COVERAGE[count]}% of cases if trainings differ more than prompts (92% with 10 seeds)."
        )
    return "Intervals resample training seeds and prompts."
