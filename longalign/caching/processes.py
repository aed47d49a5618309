"""Coordination of processes that write one store together."""

from __future__ import annotations

from typing import Any

import torch

from longalign.runtime import Runtime


def writer_options(runtime: Runtime, shard_bytes: int) -> dict[str, Any]:
    """Returns keyword arguments for a `longalign.caching.store.Store` that all processes write to."""
    return {"writable": True, "rank": runtime.rank, "processes": runtime.world_size, "shard_bytes": shard_bytes}


def wait(runtime: Runtime) -> None:
    """Blocks until all processes have called it."""
    runtime.gather(torch.zeros(1))
