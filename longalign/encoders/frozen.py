"""Runs a frozen text model on batches of token sequences (rows) grouped by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longalign.encoders.bucketing import CALL_COST, group_by_length


def device_of(model: nn.Module) -> torch.device:
    """Returns the device on which a model runs, even while accelerate has offloaded the model's weights."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    devices = [target for hook in hooks if (target := getattr(hook, "execution_device", None)) is not None]
    return torch.device(devices[0]) if devices else device


def pad_with_last(indices: Sequence[Tensor], min_length: int = 0) -> list[Tensor]:
    """Pads index tensors ``(n,)``, one per prompt, to a common length by repeating the last index of each.

    The common length is that of the longest tensor, but at least ``min_length``.
    """
    length = max(min_length, *map(len, indices))
    return [torch.cat([index, index[-1:].expand(length - len(index))]) for index in indices]


def autocast_disabled(device: torch.device) -> torch.autocast:
    """Returns a context manager that disables autocast, so that a frozen model runs in the dtype of its weights.

    Caches are made without autocast, so the states equal cached ones. T5 in half precision keeps its float32 layers.
    """
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
    """Runs a frozen text model on token sequences (rows). Equal rows run once; rows of similar length share a call.

    Args:
        run: runs the model on ids ``(r, l)`` and a bool attention mask ``(r, l)``, which is False for padding; returns
            states ``(r, l, d)``.
        rows: token ids of each sequence, including special tokens; none is empty.
        pad_id: token id that pads the rows of a call to the longest row. Padding does not change the states of a
            causal model, nor those of other models if ``run`` applies the mask.
        device: device of the model.
        max_batch_tokens: maximum number of tokens, including padding, per call of ``run``. A longer row gets its own
            call.
        call_cost: overhead of a call, as a number of tokens; see `longalign.encoders.bucketing.group_by_length`. With
            0, nothing is padded.

    Returns:
        The states of all rows and of their padding ``(m, d)``, and for each row the index of its first state. The
        states of a row are consecutive.
    """
    unique = list(dict.fromkeys(rows))
    calls = group_by_length(list(map(len, unique)), limit=max_batch_tokens, call_cost=call_cost)
    groups = [[unique[i] for i in call] for call in calls]
    ids, attention_mask, first_state, shapes = [], [], {}, []
    for group in groups:
        length = len(group[-1])
        shapes.append((len(group), length))
        for row in group:
            first_state[row] = len(ids)
            ids += [*row, *[pad_id] * (length - len(row))]
            attention_mask += [True] * len(row) + [False] * (length - len(row))
    # a single copy to the device for all groups
    sizes = [r * length for r, length in shapes]
    all_ids = torch.tensor(ids).to(device, non_blocking=True).split(sizes)
    all_masks = torch.tensor(attention_mask).to(device, non_blocking=True).split(sizes)
    with autocast_disabled(device):
        states = [run(i.view(s), m.view(s)).flatten(0, 1) for i, m, s in zip(all_ids, all_masks, shapes, strict=True)]
    return torch.cat(states), [first_state[row] for row in rows]
