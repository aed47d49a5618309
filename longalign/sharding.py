"""Gathers, shards and reshards sharded weights (FSDP2, torch's `fully_shard`).

Experimental: tested with two CPU processes (gloo), not yet on several GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether any of the module's weights is sharded."""
    return any(isinstance(submodule, FSDPModule) for submodule in module.modules())


def gather_full(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor; an unsharded one is returned unchanged.

    The result is on the CPU of the first process, and empty in the others, so that it is stored only once. All
    processes must gather the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    sharded: Any = tensor.detach()
    gathered: Tensor = sharded.full_tensor()
    return gathered.cpu() if torch.distributed.get_rank() == 0 else gathered.new_empty(0, device="cpu")


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this process's shard of a full tensor, sharded like ``like``; unchanged if ``like`` is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Frees the weights that a forward pass gathered; only this process's shards remain.

    Without a backward pass, weights stay gathered after a forward pass, and the next one would use outdated weights.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def gather_optimizer_state(state: dict[str, Any]) -> dict[str, Any]:
    """Gathers the tensors of an optimizer's `state_dict`; see `gather_full`."""
    moments = {
        i: {k: gather_full(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": moments}


def shard_optimizer_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Returns this process's shards of the output of `gather_optimizer_state`, for an optimizer of ``parameters``."""

    def shard(i: int, value: Any) -> Any:
        # values of a different shape, such as step counts, are not sharded
        return (
            shard_like(value, parameters[i])
            if isinstance(value, Tensor) and value.shape == parameters[i].shape
            else value
        )

    moments = {i: {k: shard(i, v) for k, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": moments}
