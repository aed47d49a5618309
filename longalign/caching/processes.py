"""Coordination of processes that together write one `Store`."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from longalign.runtime import Runtime


def writer_options(runtime: Runtime, shard_bytes: int) -> dict[str, Any]:
    """Returns keyword arguments for a `longalign.files.store.Store` that all processes write to.

    A process writes a file (shard) when its new entries reach ``shard_bytes`` bytes.
    """
    return {"writable": True, "rank": runtime.rank, "processes": runtime.world_size, "shard_bytes": shard_bytes}


def gather_rows(rows: torch.Tensor, count: int, runtime: Runtime) -> torch.Tensor:
    """Gathers rows from all processes; returns ``(count, ...)``, one row per item, in the order of the items.

    ``count`` is the number of items of all processes together. ``rows`` holds one row per item of this process: process
    r of n has items r, r + n, r + 2n, ...
    """
    padding = rows.new_zeros((-(-count // runtime.world_size) - len(rows), *rows.shape[1:]))
    gathered = runtime.gather(torch.cat([rows, padding]))
    return rearrange(gathered, "(r n) ... -> (n r) ...", r=runtime.world_size)[:count]


def wait(runtime: Runtime) -> None:
    """Blocks until all processes have called this function."""
    runtime.gather(torch.zeros(1))
