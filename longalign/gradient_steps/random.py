"""Random numbers that are the same in all processes; torch is imported on first use."""

from __future__ import annotations

from collections.abc import Callable

from longalign.runtime import Runtime

#: ``(low, high)`` -> a random integer from low to high, both inclusive
RandInt = Callable[[int, int], int]


def synced_randint(runtime: Runtime) -> RandInt:
    """Returns a function that samples the same random integers in all processes.

    The first process samples them from torch's global CPU generator.
    """

    def randint(low: int, high: int) -> int:
        import torch

        number = torch.randint(low, high + 1, (1,))
        return int(runtime.gather(number.to(runtime.device))[0])

    return randint
