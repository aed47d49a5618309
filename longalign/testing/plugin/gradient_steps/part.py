"""The gradient steps `my-part`."""

from __future__ import annotations

from collections.abc import Callable

from my_plugin.config import MyPartConfig

from longalign.gradient_steps import GradientSteps, synced_randint
from longalign.runtime import Runtime


class MyPart:
    """Selects ``k`` successive sampling steps that receive gradient, from a random first one.

    Args:
        k: number of gradient steps.
        randint: ``randint(low, high)`` returns a random integer from low to high, the same in all processes.
    """

    def __init__(self, k: int, *, randint: Callable[[int, int], int]):
        self.k, self.randint = k, randint

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        return cls(config.k, randint=synced_randint(runtime))

    def select(self, num_steps: int) -> GradientSteps:
        """Selects among ``num_steps`` sampling steps for one batch; 0 is the first step, with the most noise.

        All processes must select the same number of steps.
        """
        start = self.randint(0, num_steps - self.k)
        return GradientSteps(tuple(range(start, start + self.k)))
