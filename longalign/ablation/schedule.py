"""Executes the runs of an ablation, one after another in this process or several at a time in their own processes."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from longalign.ablation.cells import Run
from longalign.ablation.worker import FAILED, FINISHED, INTERRUPTED, execute, fail, read_result
from longalign.loop.interrupt import catch_signals

log = logging.getLogger("longalign")

LOG = "log.txt"
Prepare = Callable[[Run, str | None], dict[str, Any]]
"""Function (run, device) that prepares the folder of the run, and returns the argument ``job`` of `execute`."""


def run_all(runs: Sequence[Run], jobs: int, devices: Sequence[str | None], prepare: Prepare) -> bool:
    """Executes runs. A failed run does not stop the others.

    Args:
        runs: the runs to execute.
        jobs: number of runs at a time. 1 executes them in this process; otherwise each run has its own process, whose
            output is in ``log.txt`` of the run's folder.
        devices: torch devices to distribute the runs over; an element None is the default device. With one job, only
            the first device is used.
        prepare: called before a run starts, see `Prepare`.

    Returns:
        True if every run finished or failed; False if Ctrl-C, SIGTERM or SIGHUP stopped them.
    """
    progress = _Progress(len(runs))
    if jobs == 1:
        return _here(runs, devices[0], prepare, progress)
    return _in_processes(runs, jobs, devices, prepare, progress)


class _Progress:
    """Logs the end of each run, with the time left, estimated from the mean time of the runs so far."""

    def __init__(self, total: int):
        self.left, self.done, self.start = total, 0, time.monotonic()

    def ended(self, run: Run) -> None:
        result = read_result(run.folder)
        self.left, self.done = self.left - 1, self.done + 1
        per_run = (time.monotonic() - self.start) / self.done
        left = f"; {self.left} left, about {_duration(self.left * per_run)}" if self.left else ""
        if result["status"] == FAILED:
            log.error("%s: failed: %s%s", run.name, result["error"], left)
        else:
            log.info("%s: finished in %s%s", run.name, _duration(result["seconds"]), left)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _here(runs: Sequence[Run], device: str | None, prepare: Prepare, progress: _Progress) -> bool:
    for run in runs:
        log.info("%s: starting", run.name)
        if execute(run.folder, prepare(run, device)) == INTERRUPTED:
            return False
        progress.ended(run)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def _in_processes(
    runs: Sequence[Run], jobs: int, devices: Sequence[str | None], prepare: Prepare, progress: _Progress
) -> bool:
    waiting, slots = deque(runs), deque(range(jobs))
    running: dict[subprocess.Popen[bytes], tuple[Run, int]] = {}
    terminated = False
    with catch_signals() as interrupted:
        try:
            while running or (waiting and not interrupted()):
                while waiting and slots and not interrupted():
                    run, slot = waiting.popleft(), slots.popleft()
                    job = prepare(run, devices[slot % len(devices)])
                    running[_start(run.folder, job, jobs)] = run, slot
                    log.info("%s: starting", run.name)
                if interrupted() and not terminated:
                    terminated = True
                    for process in running:
                        process.terminate()  # training finishes its step and writes a checkpoint
                for process in [p for p in running if p.poll() is not None]:
                    run, slot = running.pop(process)
                    slots.append(slot)
                    ended = read_result(run.folder)["status"] in (FINISHED, FAILED)
                    if not ended and not terminated:
                        fail(run.folder, f"the process ended with status {process.returncode}; see {run.folder / LOG}")
                    if ended or not terminated:
                        progress.ended(run)
                time.sleep(0.1)
        finally:
            for process in running:
                process.kill()
                process.wait()
    return not interrupted()


def _start(folder: Path, job: Mapping[str, Any], jobs: int) -> subprocess.Popen[bytes]:
    """Starts the process of the run in ``folder``, and sends ``job`` to its standard input.

    The process is in its own session, so that a Ctrl-C in the terminal reaches it only through this process.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    with (folder / LOG).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "longalign.ablation.worker", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # a process that could not start; its status says so
        process.stdin.write(json.dumps(job).encode())
    return process
