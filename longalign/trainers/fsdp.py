"""FSDP as accelerate sets it up: what of it a run can have, how weights are handed to it, and what it leaves to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from longalign.config import RunConfig
from longalign.sharding import reshard
from longalign.trainers.base import DiffusionTrainer, Trainer


def check(plugin: Any, parallelism: Any, config: RunConfig) -> None:
    """Refuses what would split weights in a way that is not provided for.

    Args:
        plugin: accelerate's ``FullyShardedDataParallelPlugin``.
        parallelism: accelerate's ``ParallelismConfig`` or None.
        config: of the run.

    Raises:
        ValueError: naming what to change.
    """
    loop = config.loop
    refused = {
        "fsdp_version 1 flattens weights of which a LoRA trains some; set it to 2": plugin.fsdp_version != 2,
        "fsdp_cpu_ram_efficient_loading leaves text models and rewards empty in all processes but the first; set it to "
        "false": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing renames weights; set it to false, and loop.gradient_checkpointing instead": (
            plugin.activation_checkpointing
        ),
        "fsdp_offload_params is not provided for; set it to false": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_ignored_modules would not exchange gradients; leave it out": plugin.ignored_modules,
        "parallelism_config is not provided for; leave it out": parallelism is not None,
        "loop.compile is not provided for; set it to false": loop.compile,
        "loop.channels_last is a layout of whole weights; set it to false": loop.channels_last,
        "loop.precision fp16 is not provided for; use bf16 or no": loop.precision == "fp16",
    }
    for message, found in refused.items():
        if found:
            raise ValueError(f"with FSDP {message}. docs/processes.md says more")


def prepare(
    accelerator: Any, trainer: Trainer, optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> tuple[Any, Any, list[nn.Parameter]]:
    """Splits the denoiser's weights over the processes; accelerate takes one module, together with its optimiser.

    An encoder's adapter stays whole in each process: it is small, and the text models around it are called by
    themselves.

    Args:
        accelerator: accelerate's ``Accelerator``, of FSDP 2.
        trainer: whose `trainable` weights are other tensors afterwards.
        optimizer_of: makes the optimiser of some parameters.

    Returns:
        The denoiser, the optimiser of all that is trained, and of that what is whole.

    Raises:
        ValueError: if the trainer's weights cannot be split.
    """
    trainer.check_fsdp_support()
    assert isinstance(trainer, DiffusionTrainer)
    if accelerator.mixed_precision != "no" and trainer.backbone.prediction == "flow":
        raise ValueError(
            f"FSDP casts the denoiser's inputs to {accelerator.mixed_precision}, which rounds the timesteps of a flow; "
            "set loop.precision to no, and for a LoRA backbone.dtype to bfloat16"
        )
    denoiser: Any = trainer.backbone.denoiser
    inside = [p for p in denoiser.parameters() if p.requires_grad]
    known = {id(p) for p in inside}
    apart = [p for p in trainer.trainable() if id(p) not in known]
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer_of(inside))
    if apart:
        # Not in the same group, since one call cannot update split and whole weights.
        optimizer.add_param_group({"params": apart})
    return denoiser, optimizer, apart


def finish(accelerator: Any, denoiser: nn.Module, apart: Sequence[nn.Parameter]) -> None:
    """What is to be done between the backward pass and the optimiser: gathered weights are let go, and at the last of
    several micro-steps processes exchange the gradients of whole weights."""
    reshard(denoiser)
    if accelerator.sync_gradients:
        for parameter in apart:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def number(value: Any) -> Tensor:
    """A scalar as a tensor of this process, also if it was computed of split ones."""
    return value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
