"""Locks and checks the output folder of a run."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from longalign.config.checks import output_problem
from longalign.config.run import RunConfig
from longalign.files.locks import Lock
from longalign.loop.folder import recover
from longalign.loop.setup import any_process


def claim_output(config: RunConfig, accelerator: Accelerator, resume: Path | None) -> Lock | None:
    """Locks and checks the output folder of a run. The first process does this for all processes.

    Args:
        config: config of the run, with the output folder.
        accelerator: accelerate's ``Accelerator``; all of its processes must call this function.
        resume: the checkpoint or run folder to resume from; None for a new run.

    Returns:
        The lock in the first process, None in the others.

    Raises:
        ValueError: if another process is writing to the folder, or if the folder contains a run and
            ``resume`` is not in it.
        OSError: if the folder cannot be created or written to.
    """
    output, lock = Path(config.output), None
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            lock = Lock(output)
            recover(output)
            resumed = resume is not None and output.resolve() in (resume.resolve(), *resume.resolve().parents)
            if not resumed and (problem := output_problem(config)):
                raise ValueError(problem)
        except (ValueError, OSError) as error:
            failure = error
    if any_process(accelerator, failure is not None):
        if lock is not None:
            lock.release()
        raise failure or ValueError(f"the first process cannot use {output}; see its error message")
    return lock
