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
    """Trains a model as a config describes.

    Writes metrics (``log.jsonl``), checkpoints (``checkpoint-<step>/``) and images (``monitor/<step>/``) to the folder
    in the config's ``output``. On Ctrl-C, SIGTERM and SIGHUP, finishes the current step, writes a checkpoint and
    returns.

    Args:
        config: a mapping, a YAML or JSON file, a checkpoint, or a `RunConfig`; see `load_config`.
        device: a torch device, e.g. ``"cuda"``. None selects CUDA if available, else Apple's MPS, else the CPU. With
            several processes, each uses its own GPU.
        resume: a checkpoint of this run, or the run's folder, of which the newest intact checkpoint is used. The
            trained weights equal those of an uninterrupted run. The run starts from step 0 if ``resume`` is None, or if
            it is the folder in ``output`` and contains no checkpoint yet.

    Returns:
        The number of completed steps and the last checkpoint; see `longalign.loop.run.FitResult`.

    Raises:
        ConfigError: if the config or a file in it is invalid; the message lists all problems, each with the path of its
            key.
        FileNotFoundError: if ``resume`` has no checkpoint and is not the folder in ``output``.
        ValueError: if the data does not fit the trainer, another process is writing to the output folder, this
            folder contains a run and ``resume`` is not in it, or the checkpoint belongs to a different run.
        RunError: if the run had to stop: out of memory, or a non-finite loss or gradient.
        NonFiniteReward: if a reward's score is NaN or infinite. Image and prompt are saved in ``<output>/non-finite``.
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
