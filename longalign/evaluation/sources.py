"""Reads what a report shows: training runs, folders of images, metric tables, demos and ablations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longalign.checkpoints.checkpoint import read_config
from longalign.config.run import RunConfig
from longalign.evaluation.report import AblationCell
from longalign.evaluation.report_examples import Example
from longalign.evaluation.sentences import Sentences, truncated_sentences
from longalign.evaluation.table import MetricTable
from longalign.files.lines import read_jsonl
from longalign.files.paths import best_checkpoint, checkpoints, step_of
from longalign.image_folder import INDEX, read_images
from longalign.segmenters import sentences

LOG, TABLE, ABLATION = "log.jsonl", "table.json", "ablation.json"
EXPECTED = (
    f"a run (with {LOG}), images of `longalign generate` (with {INDEX}), a table of `longalign eval --json`, a demo "
    f"(with {TABLE}), or an ablation (with {ABLATION})"
)


@dataclass
class _Contents:
    """What the sources read so far contain; the fields are as for `longalign.evaluation.write_report`."""

    title: str = ""
    lead: str = ""
    table: MetricTable | None = None
    sentences: Sentences = field(default_factory=Sentences)
    folders: dict[str, Path] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    configs: dict[str, RunConfig] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ablation_cells: list[AblationCell] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    """names of the models whose image folder is a source itself; a folder listed in a table does not replace it"""


def table_data(
    table: MetricTable, folders: Mapping[str, Path], file: Path, measured: Sentences, **about: Any
) -> dict[str, Any]:
    """Returns a metric table and what a report shows beside it, as plain values for a JSON file.

    Args:
        table: the table.
        folders: name of a model -> folder of its images.
        file: path of the JSON file. The folders are stored relative to its folder.
        measured: scores and facts of the sentences of the prompts.
        **about: further entries of the file, such as ``title``, ``lead`` and ``seconds`` of
            `longalign.evaluation.write_report`.
    """
    relative = {model: Path(os.path.relpath(folder, file.parent)).as_posix() for model, folder in folders.items()}
    return {**table.to_dict(), "folders": relative, "sentences": vars(measured), **about}


def read_sources(sources: Sequence[str], examples: int | None = None) -> dict[str, Any]:
    """Reads the contents of a report. Returns the keyword arguments of `longalign.evaluation.write_report`.

    Args:
        sources: each is the path of the folder of a training run, of a folder that ``longalign generate`` wrote, of a
            table that ``longalign eval --json`` wrote, or of the folder of a demo or an ablation. ``name=path`` names
            the run, or the model that generated the images; without ``name``, the name of the folder is used.
        examples: number of examples to show, from the first; an example is a prompt with one noise seed. None shows
            all.

    Raises:
        FileNotFoundError: if a source, or an image that a source lists, does not exist.
        ValueError: if a source is none of these or cannot be read, two runs or two models have the same name, or there
            are two tables.
    """
    found = _Contents()
    for source in sources:
        name, equals, text = source.partition("=")
        path = Path(text if equals else source)
        if not path.exists() and Path(source).exists():  # a path with "="
            name, path = "", Path(source)
        _read(found, path, name if equals and name else path.resolve().name)
    title = found.title or f"Report on {', '.join([*found.folders] or [*found.logs] or [*sources])}"
    if found.table is None and not found.folders and len(found.logs) == 1:
        found.folders |= _points(next(iter(found.logs.values())).parent)
    return {
        "title": title,
        "lead": found.lead,
        "table": found.table,
        "examples": _examples(found, examples),
        "logs": found.logs,
        "configs": found.configs,
        "seconds": found.seconds,
        "score_name": found.sentences.score_name or "score",
        "cells": found.ablation_cells,
    }


def _read(found: _Contents, path: Path, name: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {EXPECTED}")
    if path.is_file():
        _read_table(found, path)
    elif (path / ABLATION).exists():
        _read_ablation(found, path / ABLATION)
    elif (path / TABLE).exists():
        _read_table(found, path / TABLE)
        for log in sorted(path.glob(f"*/{LOG}")):
            _read_run(found, log.parent, log.parent.name)
    elif (path / LOG).exists():
        _read_run(found, path, name)
    elif (path / INDEX).exists():
        if name in found.named:
            raise ValueError(f"two folders of images are called '{name}'; name them with NAME={path}")
        found.named.add(name)
        found.folders[name] = path
    else:
        raise ValueError(f"{path} has nothing to report; expected {EXPECTED}")


def _read_run(found: _Contents, run: Path, name: str) -> None:
    if name in found.logs:
        raise ValueError(f"two runs are called '{name}'; name them with NAME={run}")
    found.logs[name] = run / LOG
    if checkpoints(run):
        found.configs[name] = read_config(run)


def _points(run: Path) -> dict[str, Path]:
    """Returns the folders of images that a training run sampled at its start, its best checkpoint and its end.

    The keys are display names such as "step 200, best". Folders are missing if the run has not sampled them.
    """
    points = sorted(path.parent for path in run.glob(f"monitor/*/{INDEX}"))
    best = best_checkpoint(run)
    chosen = [p for p in points if p in (points[0], points[-1]) or (best and p.name == f"{step_of(best):06d}")]
    return {f"step {int(p.name)}" + (", best" if best and int(p.name) == step_of(best) else ""): p for p in chosen}


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; give {EXPECTED}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} contains a {type(data).__name__}, not a JSON object; expected {EXPECTED}")
    return data


def _read_table(found: _Contents, path: Path) -> None:
    data = _json(path)
    if found.table is not None:
        raise ValueError(f"{path} is a second table; a report shows only one, so write one report per table")
    required = ("values", "prompts", "seeds")  # the seeds may be unknown
    if missing := [key for key in required if key not in data or not (data[key] or key == "seeds")]:
        raise ValueError(f"{path} has no {', '.join(missing)}; expected a table of `longalign eval --json`")
    try:
        found.table = MetricTable.from_dict(data)
        found.sentences = Sentences(**data.get("sentences", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; expected a table of `longalign eval --json`") from error
    found.title, found.lead = data.get("title", found.title), data.get("lead", found.lead)
    found.seconds |= data.get("seconds", {})
    folders = {model: path.parent / folder for model, folder in data.get("folders", {}).items()}
    found.folders = folders | found.folders


def _read_ablation(found: _Contents, path: Path) -> None:
    """Reads the record of ``longalign ablate``, the curves of all its runs, and the images of each cell's first run."""
    data = _json(path)
    cells, table = data.get("cells"), path.parent / str(data.get("table", TABLE))
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and "name" in cell for cell in cells):
        raise ValueError(
            f"{path} has no list 'cells' of objects with 'name', got {str(cells)[:80]!r}; expected the record that "
            "`longalign ablate` writes"
        )
    if table.exists():  # written when the runs are finished
        _read_table(found, table)
    for cell in cells:
        name, runs = cell["name"], cell.get("runs", [])
        changes = [f"{key}={value}" for key, value in cell.get("changes", {}).items()]
        found.ablation_cells.append(
            AblationCell(name, changes, tuple(run["seed"] for run in runs if run["seed"] is not None))
        )
        for run in runs:
            images, folder = path.parent / run["images"], path.parent / run["folder"] / "train"
            finished = run.get("status", "finished") == "finished"
            if finished and name not in found.folders and (images / INDEX).exists():
                found.folders[name] = images
            if (folder / LOG).exists():
                _read_run(found, folder, name if len(runs) == 1 else f"{name}, seed {run['seed']}")
    found.title = found.title or f"Ablation {path.parent.resolve().name}"


def _examples(found: _Contents, count: int | None) -> list[Example]:
    """Returns an example for each prompt and seed of which all models have an image, at most ``count``.

    The order is that of the table, or without a table that of the first model's folder.
    """
    models = [m for m in found.table.models if m in found.folders] if found.table else list(found.folders)
    if not models:
        return []
    files = {model: _files(found.folders[model]) for model in models}
    table = found.table
    # the seeds of a table may be unknown; then a prompt has one image
    keys = list(files[models[0]])
    rows: dict[tuple[str, Any], int] = {}
    if table is not None:
        seeds = table.seeds or [seed for _, seed in keys]
        for i, pair in enumerate(zip(table.prompts, seeds, strict=False)):
            rows.setdefault(pair, i)  # an ablation repeats them for each training seed and has images of the first
        keys = list(rows)
    shared = [pair for pair in keys if all(pair in files[model] for model in models)]
    if not shared:
        raise ValueError(
            f"the images of {', '.join(models)} have no prompt and seed in common; expected images of the same prompts "
            "and seeds" + (" as in the table" if table else "")
        )
    return [_example(found, pair, {m: files[m][pair] for m in models}, rows.get(pair)) for pair in shared[:count]]


def _files(folder: Path) -> dict[tuple[str, Any], tuple[Path, str | None]]:
    """Returns (prompt, seed) -> (image file, end of the prompt that the encoder truncated; None if unknown)."""
    images = read_images(folder)
    truncated = [row.get("truncated") for _, row in read_jsonl(folder / INDEX)]
    return {(prompt, seed): (path, text) for (path, prompt, seed), text in zip(images, truncated, strict=True)}


def _example(
    found: _Contents, pair: tuple[str, Any], images: Mapping[str, tuple[Path, str | None]], row: int | None
) -> Example:
    prompt, seed = pair
    measured, shown = found.sentences, {}
    if row is None or len(measured.texts) <= row:
        texts = sentences(prompt) or [prompt]
    else:
        texts = measured.texts[row]
        shown = {
            "verdicts": {m: v[row] for m, v in measured.verdicts.items() if m in images},
            "scores": {m: v[row] for m, v in measured.scores.items() if m in images},
            "facts": measured.facts[row] if measured.facts else (),
        }
    return Example(
        sentences=texts,
        seed=seed,
        images={model: path for model, (path, _) in images.items()},
        truncated={model: truncated_sentences(texts, text) for model, (_, text) in images.items()},
        row=row,
        **shown,
    )
