"""Frozen text models run over rows of tokens in groups of length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longalign.segment import CALL_COST, group_by_length


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its input: where its weights are, or where accelerate's offloading moves them to run."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    moved_to = [place for hook in hooks if (place := getattr(hook, "execution_device", None)) is not None]
    return torch.device(moved_to[0]) if moved_to else device


def pad_with_last(places: Sequence[Tensor], least: int = 0) -> list[Tensor]:
    """Places of states ``(n,)``, one tensor for each prompt, with the last place repeated up to the longest."""
    length = max(least, *map(len, places))
    return [torch.cat([place, place[-1:].expand(length - len(place))]) for place in places]


def autocast_disabled(device: torch.device) -> torch.autocast:
    """Inside, a frozen model has the precision that it was loaded in, also where an adapter is trained in another: its
    states are those that a cache holds, and T5 in half precision keeps the layers in float32 that it needs so."""
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def run_grouped(
    run: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[tuple[int, ...]],
    *,
    pad_id: int,
    device: torch.device,
    max_batch_tokens: int,
    call_cost: int = CALL_COST,
) -> tuple[Tensor, list[int]]:
    """Runs a frozen text model over rows of tokens: equal rows once, rows of like length together.

    Args:
        run: takes ids ``(r, l)`` and a bool mask ``(r, l)`` of what is not padding; returns states ``(r, l, d)``.
        rows: token ids, special ones included; none is empty.
        pad_id: fills the shorter rows of a group up to its longest; this is exact for a causal model, and for others
            if ``run`` masks.
        device: where the model is.
        max_batch_tokens: most positions, padding included, in one call of ``run`` (one row always goes through).
        call_cost: see `longalign.segment.group_by_length`; 0 never pads.

    Returns:
        All states ``(m, d)``, and for each row the position of its first state among them.
    """
    unique = list(dict.fromkeys(rows))
    calls = group_by_length(list(map(len, unique)), limit=max_batch_tokens, call_cost=call_cost)
    groups = [[unique[i] for i in call] for call in calls]
    ids, real, first, shapes = [], [], {}, []
    for group in groups:
        length = len(group[-1])
        shapes.append((len(group), length))
        for row in group:
            first[row] = len(ids)
            ids += [*row, *[pad_id] * (length - len(row))]
            real += [True] * len(row) + [False] * (length - len(row))
    # one copy to the device for all groups
    sizes = [r * length for r, length in shapes]
    all_ids = torch.tensor(ids).to(device, non_blocking=True).split(sizes)
    all_real = torch.tensor(real).to(device, non_blocking=True).split(sizes)
    with autocast_disabled(device):
        states = [run(i.view(s), m.view(s)).flatten(0, 1) for i, m, s in zip(all_ids, all_real, shapes, strict=True)]
    return torch.cat(states), [first[row] for row in rows]
