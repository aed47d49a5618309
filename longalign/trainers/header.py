"""What a run says of itself before its first step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from longalign.data.stream import Stream
from longalign.runtime import DTYPES

if TYPE_CHECKING:
    from longalign.data.base import Data
    from longalign.trainers.loop import Run

log = logging.getLogger("longalign")

#: parameters from which a step on a CPU takes minutes
LARGE = 100_000_000


def describe(run: Run, data: Data | Stream) -> list[str]:
    """Device, precision, trained parameters, items, batch and output of a run, a line each."""
    loop, processes = run.loop, run.accelerator.num_processes
    trained = sum(p.numel() for p in run.parameters)
    total = sum(p.numel() for p in run.trainer.parameters())
    size = sum(p.numel() * p.element_size() for p in run.parameters) / 2**20
    batch = loop.batch_size * loop.accumulation * processes
    if isinstance(data, Stream):
        items = f"a stream; {loop.steps} steps see {loop.steps * batch:,} items"
    else:
        items = f"{len(data):,} items; {loop.steps} steps are {loop.steps * batch / len(data):.2f} epochs"
    saves = "at the end" if loop.save_every is None else f"every {loop.save_every} steps"
    kept = "all are kept" if loop.keep is None else f"the newest {loop.keep} are kept"
    share = f"{loop.batch_size} items x {loop.accumulation} micro-steps x {processes} processes = {batch} a step"
    resumed = [f"resumed    after step {run.step} of {loop.steps}"] if run.step else []
    return [
        *resumed,
        f"device     {_device(run.accelerator.device)}",
        f"precision  {DTYPES[loop.precision]}; frozen parts in {run.dtype}",
        f"trained    {trained:,} of {total:,} parameters, {size:,.1f} MiB",
        f"data       {items}",
        f"batch      {share}",
        f"output     {run.output}; checkpoints {saves}, {kept}",
    ]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return f"{device}, {about.name}, {about.total_memory / 2**30:.0f} GiB"
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def announce(run: Run, data: Data | Stream) -> None:
    """Logs `describe`, and warns of a model too large for a CPU and of batches larger than the data."""
    for line in describe(run, data):
        log.info("%s", line)
    total = sum(p.numel() for p in run.trainer.parameters())
    if run.accelerator.device.type == "cpu" and total > LARGE:
        log.warning("training with %.1f billion parameters on a CPU takes days; expected a GPU", total / 1e9)
    batch = run.loop.batch_size * run.accelerator.num_processes
    if not isinstance(data, Stream) and batch > len(data):
        log.warning("a batch holds %d items and the data %d, so items are repeated in it", batch, len(data))
