"""Entry point of training. Importing this module does not import torch, so config errors are reported quickly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longalign.config.checks import check_files
from longalign.config.run import RunConfig, load_config
from longalign.errors import ConfigError
from longalign.runtime import Runtime

if TYPE_CHECKING:
    from longalign.loop.run import FitResult


def fit(
    config: Mapping[str, Any] | str | Path | RunConfig, *, device: str | None = None, resume: str | Path | None = None
) -> FitResult:
    """Trains a model.

    Writes to the config's ``output``: ``log.jsonl``, ``checkpoint-<step>/``, ``monitor/<step>/``. On Ctrl-C,
    SIGTERM and SIGHUP, finishes the current step, writes a checkpoint and returns.

    Args:
        config: a mapping, a YAML or JSON file, a checkpoint, or a `RunConfig`; see `load_config`.
        device: a torch device; the fastest available one if None. With several processes, each uses its own GPU.
        resume: a checkpoint of this run, or the run's folder. The result equals that of an
            uninterrupted run. From a folder, the newest intact checkpoint is used. If the run's own output folder has
            no checkpoint, the run starts from step 0.

    Raises:
        ConfigError: if the config or its files are invalid; lists all problems, each with its path.
        ValueError: if the data does not fit the trainer, a different process is writing to the folder, the folder
            contains a run, or the checkpoint belongs to a different run.
        RunError: if the run had to stop: out of memory, or a non-finite loss or gradient.
        NonFiniteReward: if a score is not finite. Its image and prompt are saved in ``output/non-finite``.
    """
    config = load_config(config)
    if config.trainer is None:
        raise ConfigError([("trainer", "this run has no trainer; add 'trainer' to the config")])
    check_files(config, resumed=resume is not None)
    runtime = Runtime.detect(config.loop.precision, device)
    if config.cache is not None:
        from longalign.caching.precompute import check_caches

        check_caches(config, runtime)
    from longalign.loop.run import train

    return train(config, runtime, None if resume is None else Path(resume))
