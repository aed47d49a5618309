"""Random numbers that are the same in all processes; torch is imported on first use."""

from __future__ import annotations

from collections.abc import Callable

from longalign.runtime import Runtime

#: ``(low, high)`` -> a random integer from low to high, both inclusive
RandInt = Callable[[int, int], int]


def synced_randint(runtime: Runtime) -> RandInt:
    """Returns a function ``randint(low, high)`` that returns the same random integer in all processes.

    The integer is uniform from low to high, both inclusive. It is sampled by the first process from torch's global CPU
    generator. All processes must call the function together.
    """

    def randint(low: int, high: int) -> int:
        import torch

        number = torch.randint(low, high + 1, (1,))
        return int(runtime.gather(number.to(runtime.device))[0])

    return randint
