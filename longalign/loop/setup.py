"""Sets up accelerate: the processes of a run, their precision, and the runtime that parts are built for."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from longalign.config.run import RunConfig
from longalign.config.sections import LoopConfig
from longalign.loop.fsdp import check_fsdp_config
from longalign.runtime import Runtime

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def make_accelerator(config: RunConfig, device: str) -> Accelerator:
    """Creates accelerate's ``Accelerator``, which joins the processes of the launch.

    Args:
        config: config of the run, with precision, gradient accumulation, trackers and output folder.
        device: a torch device. ``"cpu"`` disables GPUs; otherwise accelerate selects the device of each process.

    Raises:
        ValueError: if the configuration of ``accelerate launch`` is not supported.
    """
    loop = config.loop
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != loop.precision:
        AcceleratorState._reset_state()  # an earlier run in this process had a different precision
    accelerator = Accelerator(
        mixed_precision=loop.precision,
        gradient_accumulation_steps=loop.accumulation,
        cpu=device == "cpu",
        log_with=list(loop.trackers) or None,
        project_dir=config.output,
        # Buffers are constant. Processes wait while one samples images and writes files, hence the long timeout.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )
    if accelerator.distributed_type in ENGINES:
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported; use one process, or accelerate's multi-GPU, "
            "multi-CPU or FSDP. See docs/processes.md"
        )
    if is_sharded(accelerator):
        check_fsdp_config(accelerator.state.fsdp_plugin, accelerator.parallelism_config, config)
    dynamo: Any = accelerator.state.dynamo_plugin
    if dynamo.backend.value != "NO":
        raise ValueError(
            f"accelerate's dynamo_backend is {dynamo.backend.value}, which would compile text encoding too; set it "
            "to 'no'. To compile only the denoiser, set loop.compile"
        )
    return accelerator


def check_cuda_graphs(loop: LoopConfig, accelerator: Accelerator) -> None:
    """Raises ValueError if ``loop.cuda_graphs`` is set without a CUDA device, or with several processes."""
    if loop.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        raise ValueError(
            f"loop.cuda_graphs needs one process on a CUDA device, got num_processes={accelerator.num_processes} "
            f"and device '{accelerator.device.type}'; set loop.cuda_graphs to false"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP shards the denoiser's weights over the processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def process_runtime(accelerator: Accelerator, runtime: Runtime) -> Runtime:
    """Returns a copy of ``runtime`` with this process's device and rank, the number of processes and ``gather``.

    With one process, ``runtime`` itself is returned.
    """
    if accelerator.num_processes == 1:
        return runtime
    return replace(
        runtime,
        device=str(accelerator.device),
        gather=accelerator.gather,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether ``flag`` is true in any process; all processes must call this function."""
    if accelerator.num_processes == 1:
        return flag
    total: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device))
    return bool(total > 0)


def seed_generators(seed: int) -> None:
    """Seeds the global random generators of Python, NumPy and torch in this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
