"""Runs an ablation, which trains and compares variants of a config. Does not import torch on import."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longalign.ablation.cells import Cell, Changes, Run, changed_lines, make_cells, runs_of
from longalign.ablation.worker import FAILED, FINISHED, IMAGES, JOB, RESULT, read_result, write_json
from longalign.checkpoints.redaction import redacted
from longalign.config.changes import plain
from longalign.config.checks import check_parts
from longalign.config.run import RunConfig, load_config, to_dict
from longalign.data.prompts.sets import read_prompt_set
from longalign.errors import ConfigError
from longalign.files.locks import Lock
from longalign.files.paths import check_folder
from longalign.metrics.config import MetricConfig, name_problems
from longalign.registry import PartConfig
from longalign.registry import metrics as metric_parts
from longalign.runtime import Runtime, devices

if TYPE_CHECKING:
    from longalign.evaluation.table import MetricTable

log = logging.getLogger("longalign")

RECORD, TABLE = "ablation.json", "table"
Metric = str | Mapping[str, Any] | PartConfig | Callable[..., Any]


@dataclass(frozen=True)
class Ablation:
    """Result of an ablation.

    Attributes:
        output: folder of the ablation.
        table: metrics of the cells, compared with those of the first cell. None if no run finished, or the ablation was
            interrupted.
        failed: name of a failed run -> error message.
        interrupted: whether the ablation was stopped, e.g. by Ctrl-C; the same call of `ablate` continues it.
    """

    output: Path
    table: MetricTable | None
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def ablate(
    base: Mapping[str, Any] | str | Path | RunConfig,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    cells: Mapping[str, Changes] | Sequence[Changes] | None = None,
    metrics: Sequence[Metric],
    output: str | Path,
    seeds: int | Sequence[int] = 3,
    prompts: Sequence[str] | str | None = None,
    num_prompts: int = 64,
    images: int = 1,
    num_steps: int = 25,
    guidance: float = 7.5,
    solver: str = "unipc",
    batch_size: int = 8,
    train: bool = True,
    jobs: int | None = None,
    device: str | None = None,
) -> Ablation:
    """Runs an ablation: trains variants of a config (cells), samples the same prompts with each, and compares metrics.

    Each cell is trained once per training seed. Only the config's ``seed`` differs between these runs; the data are the
    same. All runs sample the same prompts from the same noise. Writes to ``output``: ``ablation.json`` (cells, changes,
    runs and their folders), ``table.json``, ``table.csv``, ``table.md``, ``report.html``, and for each run a folder
    ``<cell>/seed-<seed>`` (``<cell>/base`` without training) with the training in ``train`` and the images in
    ``images``. The same call continues an interrupted ablation, repeats failed runs and adds new cells and seeds;
    finished runs are kept.

    Args:
        base: the config that cells change, see `longalign.load_config`.
        vary: dotted path of a config key -> values. The cells are all combinations of the values.
        cells: instead of ``vary``: name of a cell -> changes, or a list of changes. Changes map dotted paths of config
            keys to new values. The other cells are compared with the first one.
        metrics: each is the name or the config of a metric, a `longalign.metrics.Metric`, or a function as for
            `longalign.evaluation.evaluate`. If ``prompts`` is None, a ``facts`` metric without ``data`` reads the facts
            of the held-out data.
        output: folder of the ablation; created if missing.
        seeds: number of training seeds, counted up from the config's ``seed``, or a sequence of training seeds.
        prompts: a sequence of prompts, or the path of a file or prompt set (see
            `longalign.data.prompts.sets.read_prompt_set`), whose labels are added to the table. None takes held-out
            prompts of the base config's data.
        num_prompts: number of held-out prompts if ``prompts`` is None.
        images: number of images per prompt, from the noise seeds 0, 1 and so on.
        num_steps: number of sampling steps.
        guidance: scale of classifier-free guidance; 1 is no guidance.
        solver: name of the ODE solver for sampling, see `longalign.inference.schedulers.make_scheduler`.
        batch_size: number of images per batch, in sampling and measuring.
        train: False measures the untrained model of each cell. Cells whose config has no trainer are never trained.
        jobs: number of runs at a time; above 1, each run is in its own process, where parts that only this process
            registered are unknown. None: the number of GPUs, at least 1.
        device: torch device of all runs, e.g. "cuda:0"; None distributes the runs over the GPUs.

    Raises:
        ConfigError: if a cell is invalid, listing the problems of all cells; if a metric is invalid; or if ``prompts``
            is None and the data has no held-out prompts.
        ValueError: if ``metrics``, ``prompts`` or ``seeds`` is empty, if a training seed occurs twice, or if ``output``
            has an ablation with a different base config, prompts or sampling; the message lists the differences.
    """
    base, output = load_config(base), Path(output)
    check_folder(output)
    planned = make_cells(base, vary, cells, train)
    training_seeds = _training_seeds(base, seeds, planned)
    runs = runs_of(planned, training_seeds, output)
    prompt_set = read_prompt_set(prompts) if isinstance(prompts, str) else None
    configs, texts = _measured(base, metrics, prompt_set.texts if prompt_set else prompts, num_prompts)
    from longalign.ablation.schedule import run_all

    texts = texts if isinstance(texts, list) else _prompts_of_data(texts)
    sampling = {"seeds": list(range(images)), "num_steps": num_steps, "guidance": guidance, "solver": solver}
    record = {"base": redacted(_identity(base)), "prompts": texts, "sampling": sampling}
    lock = Lock(output)
    try:
        _check_unchanged(output, record, runs)

        def save() -> None:
            state = _state(output, planned, training_seeds, runs, configs)
            write_json(output / RECORD, {**record, **redacted(state)})

        save()
        pending = [run for run in runs if not _is_finished(run)]
        gpus = [name for name in devices() if name.startswith("cuda:")] if device is None else []
        jobs = min(jobs or max(1, len(gpus)), max(1, len(pending)))
        _make_caches(pending, device)

        def prepare(run: Run, device: str | None) -> dict[str, Any]:
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / RESULT).unlink(missing_ok=True)
            job = {"config": to_dict(run.config), "train": run.cell.trained, "prompts": texts, "device": device}
            job |= {"sampling": {**sampling, "batch_size": batch_size}}
            write_json(run.folder / JOB, redacted(job))
            return job

        log.info("%d cells, %d runs, %d of them finished", len(planned), len(runs), len(runs) - len(pending))
        complete = run_all(pending, jobs, gpus or [device], prepare)
        save()
        failed = {run.name: r["error"] for run in runs if (r := read_result(run.folder))["status"] == FAILED}
        finished = [run for run in runs if _is_finished(run)]
        if not complete or not finished:
            return Ablation(output, None, failed, not complete)
        from longalign.ablation.results import write_results

        runtime = Runtime.detect(device=device)
        built = [metric_parts.construct(m, runtime).eval() if isinstance(m, PartConfig) else m for m in configs]
        table = write_results(output, finished, training_seeds, built, batch_size, prompt_set)
        return Ablation(output, table, failed)
    finally:
        lock.release()


def _training_seeds(base: RunConfig, seeds: int | Sequence[int], cells: Sequence[Cell]) -> list[int]:
    chosen = [base.seed + i for i in range(seeds)] if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"expected one or more different training seeds, got {seeds}")
    return chosen if any(cell.trained for cell in cells) else chosen[:1]


def _measured(
    base: RunConfig, metrics: Sequence[Metric], prompts: Sequence[str] | None, count: int
) -> tuple[list[Any], Any]:
    """Returns the metrics with validated configs, and the prompts or the config of the data with held-out prompts."""
    if not metrics:
        raise ValueError("nothing to measure; give metrics, e.g. ['facts']")
    configs: list[Any] = [metric_parts.validate(m) if isinstance(m, (str, Mapping)) else m for m in metrics]
    if problems := name_problems(m for m in configs if isinstance(m, MetricConfig)):
        raise ConfigError(problems)
    if prompts is not None:
        texts = list(prompts)
        if not texts:
            raise ValueError("expected at least one prompt, got none; give prompts, or None for held-out ones")
    else:
        texts = None if base.data is None else base.data.held_out(count)
        if texts is None:
            who = "a config without data" if base.data is None else f"'{base.data.name}'"
            raise ConfigError(
                [("data", f"{who} has no held-out prompts; set prompts (--prompts), or set data to 'scenes'")]
            )
        configs = [m.for_data(texts) if isinstance(m, MetricConfig) else m for m in configs]
    check_parts({f"metrics.{i}": m for i, m in enumerate(configs) if isinstance(m, PartConfig)})
    return configs, texts


def _prompts_of_data(config: Any) -> list[str]:
    data = config.build(Runtime())
    return [data.prompt(i) for i in range(len(data))]


def _identity(config: RunConfig) -> dict[str, Any]:
    """Returns a config as plain values, without seed and output, which an ablation sets."""
    return {key: value for key, value in to_dict(config).items() if key not in ("seed", "output")}


def _check_unchanged(output: Path, record: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Raises ValueError if ``output`` has an ablation with a different ``record``.

    Also raises it if one of ``runs`` was started before with a different config.
    """
    lines = []
    if (output / RECORD).exists():
        old = json.loads((output / RECORD).read_text(encoding="utf-8"))
        lines = list(changed_lines({key: old.get(key) for key in record}, record))
    if not lines:
        for run in runs:
            if (run.folder / JOB).exists():
                old = json.loads((run.folder / JOB).read_text(encoding="utf-8"))
                before = {**old["config"], "output": "", "trained": old["train"]}
                now = {**redacted(to_dict(run.config)), "output": "", "trained": run.cell.trained}
                lines += list(changed_lines(before, now, run.name))
    if lines:
        raise ValueError(
            f"{output} already contains an ablation with different settings:\n  "
            + "\n  ".join(lines[:20])
            + "\nChoose a different output, remove the folder, or use the same settings"
        )


def _is_finished(run: Run) -> bool:
    return read_result(run.folder)["status"] == FINISHED


def _make_caches(runs: Sequence[Run], device: str | None) -> None:
    """Computes the missing cache entries of all runs before the runs start, since several runs share a cache."""
    configs = {run.config.cache.folder: run.config for run in runs if run.cell.trained and run.config.cache}
    for config in configs.values():
        from longalign.caching.precompute import make_caches

        make_caches(config, Runtime.detect(config.loop.precision, device), progress=True)


def _state(
    output: Path, cells: Sequence[Cell], seeds: Sequence[int], runs: Sequence[Run], configs: Sequence[Any]
) -> dict[str, Any]:
    """Returns the entries of ``ablation.json`` that may change between calls. Folders are relative to ``output``."""

    def row(run: Run) -> dict[str, Any]:
        folder, result = run.folder.relative_to(output), read_result(run.folder)
        shown = {key: result.get(key) for key in ("status", "seconds", "error")}
        checkpoint = result.get("checkpoint")
        paths = {"folder": str(folder), "images": str(folder / IMAGES)}
        return {"seed": run.seed, **paths, "checkpoint": checkpoint and str(folder / checkpoint), **shown}

    return {
        "seeds": list(seeds),
        "metrics": [plain(m) if isinstance(m, PartConfig) else str(m) for m in configs],
        "cells": [
            {
                "name": cell.name,
                "changes": {key: plain(value) for key, value in cell.changes.items()},
                "trained": cell.trained,
                "folder": cell.folder,
                "runs": [row(run) for run in runs if run.cell is cell],
            }
            for cell in cells
        ],
        "table": f"{TABLE}.json",
    }
