"""Gathers and shards the weights of modules that are sharded over processes (FSDP2, torch's ``fully_shard``).

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
    """Whether FSDP2 shards the weights of the module or of any of its submodules over processes."""
    return any(isinstance(submodule, FSDPModule) for submodule in module.modules())


def gather_full(tensor: Tensor) -> Tensor:
    """Returns the full tensor of which each process has a shard. A tensor that is not sharded is returned unchanged.

    The first process gets the full tensor on its CPU, all other processes an empty tensor, to save memory. All
    processes must gather the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    sharded: Any = tensor.detach()
    gathered: Tensor = sharded.full_tensor()
    return gathered.cpu() if torch.distributed.get_rank() == 0 else gathered.new_empty(0, device="cpu")


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a full tensor as a DTensor, sharded over processes as ``like`` is.

    If ``like`` is not sharded, ``tensor`` is returned unchanged. Every process must have the full tensor, which has the
    full shape of ``like``.
    """
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Frees the full weights that a forward pass of a sharded module gathered; only this process's shards remain.

    If no backward pass follows, FSDP2 keeps the full weights. A forward pass after an optimizer step would then use
    outdated weights.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def gather_optimizer_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's ``state_dict`` with full instead of sharded tensors.

    Of sharded tensors, only the first process gets the values, all other processes get empty tensors; see
    `gather_full`.
    """
    moments = {
        i: {k: gather_full(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": moments}


def shard_optimizer_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Returns the ``state_dict`` of an optimizer, with full tensors, sharded like the optimizer's parameters.

    Inverse of `gather_optimizer_state`, if every process has the gathered tensors.

    Args:
        state: state dict with full tensors.
        parameters: parameters of the optimizer, in the order of the state dict's indices.
    """

    def shard(i: int, value: Any) -> Any:
        # values of a different shape, such as step counts, are not sharded
        return (
            shard_like(value, parameters[i])
            if isinstance(value, Tensor) and value.shape == parameters[i].shape
            else value
        )

    moments = {i: {k: shard(i, v) for k, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": moments}
