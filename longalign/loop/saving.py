"""Writes the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longalign.checkpoints import checkpoint
from longalign.compose import Composition
from longalign.files.weights import save_pickle
from longalign.loop.folder import new_checkpoint, publish
from longalign.loop.logs import MetricMeans
from longalign.loop.monitor import Monitor
from longalign.loop.optimization import Optimization
from longalign.loop.resume_state import FOLDER, process_state, shared_state


def save_checkpoint(
    composition: Composition,
    optimization: Optimization,
    means: MetricMeans,
    monitor: Monitor,
    origin: dict[str, Any],
    step: int,
) -> Path:
    """Writes a checkpoint, with weights, config and training state, and returns its folder.

    All processes must call this function. The folder gets its final name when all processes have written their files.

    Args:
        composition: the run's config and its built parts.
        optimization: has parameters, optimizer, learning rate and moving average.
        means: metrics since the last log line.
        monitor: the monitor, whose measurements so far decide whether the checkpoint is the best one.
        origin: result of `longalign.loop.resume_checks.input_fingerprints` at the start of the run.
        step: number of completed optimizer steps.

    Raises:
        OSError: if a file cannot be written; the message names the checkpoint to resume from.
    """
    config, accelerator = composition.config, optimization.accelerator
    backbone = composition.backbone if config.backbone is not None else None
    encoder = composition.encoder if config.encoder is not None else None
    with new_checkpoint(Path(config.output), step) as (unfinished, final):
        folder = unfinished / FOLDER
        folder.mkdir(exist_ok=True)
        if accelerator.is_main_process or optimization.sharded:
            with optimization.averaged():
                weights = checkpoint.collect(backbone, encoder)
                if accelerator.is_main_process:
                    checkpoint.write(unfinished, config, weights, step)
                    composition.trainer.save(unfinished)
            shared = shared_state(optimization, monitor.state(), origin, step)
            if accelerator.is_main_process:
                save_pickle(folder / "shared.pt", shared)
        save_pickle(folder / f"process-{accelerator.process_index}.pt", process_state(means, monitor.means))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            publish(unfinished, final, config.loop.keep, is_best=monitor.best_step == step)
    accelerator.wait_for_everyone()
    return final
