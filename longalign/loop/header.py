"""Logs the summary of a run before the first step."""

from __future__ import annotations

import logging

import torch

from longalign.compose import Composition
from longalign.data.stream import Stream
from longalign.loop.optimization import Optimization
from longalign.runtime import DTYPES

log = logging.getLogger("longalign")

#: number of parameters above which a training step on a CPU takes minutes, so that the user is warned
LARGE = 100_000_000


def log_run_summary(composition: Composition, optimization: Optimization, step: int, num_images: int) -> None:
    """Logs device, precision, parameters (trainable, or frozen because unused), data, batch size and output of a run.

    Warns if a model of more than `LARGE` parameters is trained on a CPU, or if a batch has more items than the data.

    Args:
        composition: the run's config and its built parts.
        optimization: the run's trainer, trainable parameters and ``Accelerator``.
        step: number of completed optimizer steps; above 0, the run is shown as resumed.
        num_images: number of images that the monitor generates for each measurement; 0 without a monitor.
    """
    config, data, accelerator = composition.config, composition.data, optimization.accelerator
    loop, processes, parameters = config.loop, accelerator.num_processes, optimization.parameters
    trainable = sum(p.numel() for p in parameters)
    total = sum(p.numel() for p in optimization.trainer.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters) / 2**20
    batch_size = loop.batch_size * loop.accumulation * processes
    if isinstance(data, Stream):
        items = f"a stream; {loop.steps} steps read {loop.steps * batch_size:,} items"
    else:
        items = f"{len(data):,} items; {loop.steps} steps are {loop.steps * batch_size / len(data):.2f} epochs"
    save_every = "at the end" if loop.save_every is None else f"every {loop.save_every} steps"
    keep = "all are kept" if loop.keep is None else f"the newest {loop.keep} are kept"
    product = f"{loop.batch_size} items x {loop.accumulation} micro-steps x {processes} processes"
    resumed = [f"resumed    after step {step} of {loop.steps}"] if step else []
    settings = config.monitor
    monitored = []
    if settings is not None:
        measured = ", ".join(metric.prefix() for metric in settings.metrics) or "images only"
        monitored = [f"monitor    {num_images} images every {settings.every} steps: {measured}"]
    unused = {} if config.backbone is None else composition.backbone.unused_weights()
    frozen = []
    if unused and composition.backbone.full_finetune:
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in unused))
        number = sum(parameter.numel() for parameter in unused.values())
        frozen = [f"frozen     {number:,} parameters that cannot change the prediction, of {layers}"]
    lines = [
        *resumed,
        f"device     {_device_summary(accelerator.device)}",
        f"precision  {DTYPES[loop.precision]}; frozen parts in {composition.runtime.dtype}",
        f"trainable  {trainable:,} of {total:,} parameters, {size:,.1f} MiB",
        *frozen,
        f"data       {items}",
        f"batch      {product} = {batch_size} per step",
        f"output     {config.output}; checkpoints {save_every}, {keep}",
        *monitored,
    ]
    for line in lines:
        log.info("%s", line)
    if accelerator.device.type == "cpu" and total > LARGE:
        log.warning("training %.1f billion parameters on a CPU takes days; use a GPU", total / 1e9)
    if not isinstance(data, Stream) and loop.batch_size * processes > len(data):
        log.warning(
            "a batch has %d items but the data only %d, so batches repeat items; lower loop.batch_size",
            loop.batch_size * processes,
            len(data),
        )


def _device_summary(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
