"""Saves and restores the training state of a run, apart from its config and weights file, for exact resuming."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longalign.config.run import RunConfig, load_config
from longalign.files.paths import checkpoints, read_metadata
from longalign.files.weights import load_pickle, load_tensors, reading
from longalign.hub import CHECKPOINT
from longalign.loop.logs import MetricMeans
from longalign.loop.optimization import Optimization
from longalign.sharding import gather_full, gather_optimizer_state, shard_like, shard_optimizer_state

log = logging.getLogger("longalign")

FOLDER = "resume"

#: keys of the results of `shared_state` and `process_state`
SHARED_KEYS = {"step", "origin", "processes", "parameters", "buffers", "optimizer", "rates", "ema", "scaler", "monitor"}
PROCESS_KEYS = {"python", "numpy", "torch", "cuda", "means", "monitor"}


def random_state() -> dict[str, Any]:
    """Returns the states of this process's global random generators: Python, NumPy, torch on CPU and CUDA."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores the result of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass(frozen=True)
class ResumeState:
    """The training state in a checkpoint, from which a run can be resumed.

    Attributes:
        checkpoint: folder of the checkpoint.
        config: config of the run that wrote the checkpoint.
        versions: package name -> version in that run.
        shared: result of `shared_state`.
        by_process: result of `process_state` of each process, by rank.
    """

    checkpoint: Path
    config: RunConfig
    versions: dict[str, str]
    shared: dict[str, Any]
    by_process: list[dict[str, Any]]


def find_state(path: Path, output: Path) -> ResumeState | None:
    """Loads the training state in a checkpoint, or in the newest intact checkpoint of a run.

    In a run's folder, damaged checkpoints are skipped with a warning.

    Args:
        path: a checkpoint folder, the weights file in it, or a run's folder.
        output: the run's output folder.

    Returns:
        The state, or None if ``path`` is the run's own output folder and contains no checkpoint yet, so that there is
        nothing to resume.

    Raises:
        FileNotFoundError: if ``path`` has no checkpoint and is not ``output``.
        ValueError: if the checkpoint, or each one of the run, is damaged; the message names a damaged file of the
            newest one.
        OSError: like ValueError, if that file cannot be read.
    """
    if path.is_file():
        path = path.parent
    if path.is_symlink():  # the best checkpoint
        path = path.resolve()
    if (path / CHECKPOINT).is_file():
        return load_state(path)
    newest_error: Exception | None = None
    for checkpoint in reversed(checkpoints(path)):
        try:
            return load_state(checkpoint)
        except (ValueError, OSError) as error:
            newest_error = newest_error or error
            log.warning("%s is damaged and is skipped: %s", checkpoint.name, error)
    if newest_error is not None:
        raise newest_error
    if path.resolve() != output.resolve():
        raise FileNotFoundError(f"no checkpoint in {path}; expected {CHECKPOINT} or checkpoint-<step>/ there")
    return None


def load_state(checkpoint: Path) -> ResumeState:
    """Loads the training state in a checkpoint folder, and checks that the weights file in it can be read too.

    Raises:
        ValueError: if a file is missing or damaged; the message names the file.
    """
    path, folder = checkpoint / CHECKPOINT, checkpoint / FOLDER
    config = load_config(path)
    if not (folder / "shared.pt").is_file():
        raise ValueError(
            f"{checkpoint} has no {FOLDER}/ folder, so it cannot be resumed; start a new run from its weights with "
            "init_from"
        )
    load_tensors(path)
    # memory-mapped, since every process reads the file and keeps only its shard
    shared = load_pickle(folder / "shared.pt", checked=True)
    if not isinstance(shared, dict) or not shared.keys() >= SHARED_KEYS:
        expected = ", ".join(sorted(SHARED_KEYS))
        raise ValueError(
            f"{folder / 'shared.pt'} is not the state of a run; expected the keys {expected}. Copy the checkpoint again"
        )
    by_process = []
    for rank in range(int(shared["processes"])):
        file = folder / f"process-{rank}.pt"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {file.name}; expected one file for each of {shared['processes']} processes. Copy "
                "the checkpoint again"
            )
        state = load_pickle(file, checked=True)
        if not isinstance(state, dict) or not state.keys() >= PROCESS_KEYS:
            expected = ", ".join(sorted(PROCESS_KEYS))
            raise ValueError(
                f"{file} is not the state of a process; expected the keys {expected}. Copy the checkpoint again"
            )
        by_process.append(state)
    with reading(path):
        saved_versions = json.loads(read_metadata(path).get("versions", "{}"))
    return ResumeState(checkpoint, config, saved_versions, shared, by_process)


def shared_state(
    optimization: Optimization, monitor: dict[str, Any], origin: dict[str, Any], step: int
) -> dict[str, Any]:
    """Returns the state for a checkpoint that is the same in all processes, and that the first process writes.

    With FSDP, all processes must call this function, and only the first one gets the full tensors.

    Args:
        optimization: has parameters, optimizer, learning rate and moving average.
        monitor: result of `longalign.loop.monitor.Monitor.state`.
        origin: result of `longalign.loop.resume_checks.input_fingerprints` at the start of the run.
        step: number of completed optimizer steps.
    """
    ema = None if optimization.ema is None else optimization.ema.state_dict()
    buffers = dict(optimization.trainer.named_buffers())
    scaler = optimization.accelerator.scaler
    return {
        "step": step,
        "origin": origin,
        "processes": optimization.accelerator.num_processes,
        "parameters": [gather_full(p.detach()) for p in optimization.parameters],
        "buffers": {k: v for k, v in optimization.trainer.state_dict().items() if k in buffers},
        "optimizer": gather_optimizer_state(optimization.optimizer.state_dict()),
        "rates": {k: v for k, v in optimization.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
        "ema": None if ema is None else {**ema, "shadow_params": [gather_full(p) for p in ema["shadow_params"]]},
        "scaler": None if scaler is None else scaler.state_dict(),
        "monitor": monitor,
    }


def process_state(means: MetricMeans, monitor: MetricMeans) -> dict[str, Any]:
    """Returns the state of this process for a checkpoint: random generators, and metrics that are not yet logged.

    Args:
        means: metrics since the last log line.
        monitor: metrics since the last measurement of the monitor.
    """
    return {**random_state(), "means": means.state(), "monitor": monitor.state()}


def restore_state(state: ResumeState, optimization: Optimization, means: MetricMeans, monitor: MetricMeans) -> int:
    """Restores the training state of this process, including its random generators.

    Args:
        state: the state in a checkpoint.
        optimization: its parameters, optimizer, learning rate and moving average are overwritten.
        means: receives the metrics since the last log line.
        monitor: receives the metrics since the last measurement of the monitor.

    Returns:
        The number of completed optimizer steps.

    Raises:
        ValueError: if the shapes of the saved and the trainable parameters differ.
    """
    accelerator, parameters = optimization.accelerator, optimization.parameters
    shared, process = state.shared, state.by_process[accelerator.process_index]
    if [tuple(saved.shape) for saved in shared["parameters"]] != [tuple(p.shape) for p in parameters]:
        raise ValueError(
            f"the parameters in {state.checkpoint} and those that this config trains have different shapes; "
            "resume with the config of the checkpoint"
        )
    with torch.no_grad():
        for parameter, saved in zip(parameters, shared["parameters"], strict=True):
            parameter.copy_(shard_like(saved, parameter))
    optimization.trainer.load_state_dict(shared["buffers"], strict=False)
    optimization.optimizer.load_state_dict(shard_optimizer_state(shared["optimizer"], parameters))
    lr_scheduler = optimization.lr_scheduler
    lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), **shared["rates"]})
    if optimization.ema is not None:
        averages = zip(shared["ema"]["shadow_params"], parameters, strict=True)
        shards = [shard_like(average, parameter) for average, parameter in averages]
        optimization.ema.load_state_dict({**shared["ema"], "shadow_params": shards})
        optimization.ema.to(accelerator.device)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(shared["scaler"])
    means.load(process["means"], accelerator.device)
    monitor.load(process["monitor"], accelerator.device)
    set_random_state(process)
    return shared["step"]
