"""Weights of which each process keeps a share only (FSDP2, torch's `fully_shard`): gathered, dealt out, let go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_full(tensor: Tensor) -> Tensor:
    """A tensor in one piece; one that is in one piece is returned as it is.

    One that is split is gathered on the CPU of the first process, and is empty in the others, so that it is held once.
    All processes must ask for the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    split: Any = tensor.detach()
    gathered: Tensor = split.full_tensor()
    return gathered.cpu() if torch.distributed.get_rank() == 0 else gathered.new_empty(0, device="cpu")


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, split as ``like`` is; if that is not split, the tensor as it is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Keeps only this process's share of weights that a call gathered.

    Calls without a backward pass after them leave them gathered, and the next call would not see a change of them.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gather_optimizer_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's `state_dict` with its tensors in one piece, see `whole`."""
    moments = {
        i: {k: gather_full(v) if isinstance(v, Tensor) else v for k, v in of.items()}
        for i, of in state["state"].items()
    }
    return {**state, "state": moments}


def shard_optimizer_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """This process's share of what `gather_optimizer_state` gave, for an optimiser of ``parameters``."""

    def dealt(i: int, value: Any) -> Any:
        # what has another shape than the parameter, a number of steps, is not split
        return (
            shard_like(value, parameters[i])
            if isinstance(value, Tensor) and value.shape == parameters[i].shape
            else value
        )

    moments = {i: {k: dealt(i, v) for k, v in of.items()} for i, of in state["state"].items()}
    return {**state, "state": moments}
