"""FSDP2 through accelerate: config checks, sharding, and gradient exchange of unsharded parameters.

Experimental: tested with two CPU processes (gloo), not yet on several GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from longalign.config.run import RunConfig
from longalign.sharding import reshard
from longalign.trainers.base import Trainer


def check_fsdp_config(plugin: Any, parallelism: Any, config: RunConfig) -> None:
    """Rejects unsupported FSDP settings.

    Args:
        plugin: accelerate's ``FullyShardedDataParallelPlugin``.
        parallelism: accelerate's ``ParallelismConfig`` or None.
        config: the run's config.

    Raises:
        ValueError: if a setting is not supported; the message names the setting to change.
    """
    loop = config.loop
    unsupported = {
        "fsdp_version 1 is not supported, since it flattens weights that a LoRA trains in part; set it to 2": (
            plugin.fsdp_version != 2
        ),
        "fsdp_cpu_ram_efficient_loading is not supported, since it loads text models and rewards in the first process "
        "only; set it to false": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing is not supported, since it renames weights; set it to false and use "
        "loop.gradient_checkpointing": plugin.activation_checkpointing,
        "fsdp_offload_params is not supported; set it to false": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_ignored_modules is not supported, since their gradients are not exchanged; remove it": (
            plugin.ignored_modules
        ),
        "parallelism_config is not supported; remove it": parallelism is not None,
        "loop.compile is not supported; set it to false": loop.compile,
        "loop.channels_last is not supported, since it applies to unsharded weights; set it to false": (
            loop.channels_last
        ),
        "loop.precision fp16 is not supported; use bf16 or no": loop.precision == "fp16",
    }
    for message, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"with FSDP, {message}. See docs/processes.md")


def prepare_fsdp(
    accelerator: Any, trainer: Trainer, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> tuple[Any, Any, list[nn.Parameter]]:
    """Shards the denoiser's weights over the processes.

    accelerate shards one module, together with its optimizer. The encoder's adapter stays unsharded, because it is
    small and is called separately from the text models around it.

    Args:
        accelerator: accelerate's ``Accelerator`` with FSDP2.
        trainer: the trainer; the parameters of its denoiser are replaced by shards.
        make_optimizer: creates the optimizer of the given parameters.

    Returns:
        The sharded denoiser, accelerate's optimizer of all trainable parameters, and the trainable parameters that are
        not sharded.

    Raises:
        ValueError: if the trainer does not support FSDP.
    """
    denoiser: Any = trainer.fsdp_module(accelerator.mixed_precision)
    sharded = [p for p in denoiser.parameters() if p.requires_grad]
    sharded_ids = {id(p) for p in sharded}
    unsharded = [p for p in trainer.trainable() if id(p) not in sharded_ids]
    denoiser, optimizer = accelerator.prepare(denoiser, make_optimizer(sharded))
    if unsharded:
        # a separate group, since one optimizer call cannot update sharded and unsharded parameters
        optimizer.add_param_group({"params": unsharded})
    return denoiser, optimizer, unsharded


def finish_backward(accelerator: Any, denoiser: nn.Module, unsharded: Sequence[nn.Parameter]) -> None:
    """Frees the denoiser's gathered weights after a backward pass, and averages gradients of unsharded parameters.

    The average is over all processes. With gradient accumulation, it is taken only in the last micro-step.
    """
    reshard(denoiser)
    if accelerator.sync_gradients:
        for parameter in unsharded:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def to_local_scalar(value: Any) -> Tensor:
    """Converts a scalar, which may be a ``DTensor``, to a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
