"""The built-in methods of the kind ``gradient_steps``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longalign.gradient_steps.base import GradientSteps
from longalign.gradient_steps.config import check_groups, check_last
from longalign.runtime import Runtime

#: ``(low, high)`` -> a random integer from low to high, both inclusive
RandInt = Callable[[int, int], int]


def synced_randint(runtime: Runtime) -> RandInt:
    """Random integers from torch's global CPU generator; all processes get those of the first process."""

    def randint(low: int, high: int) -> int:
        number = torch.randint(low, high + 1, (1,))
        return int(runtime.gather(number.to(runtime.device))[0])

    return randint


class GroupedRandom:
    """One step in each of several equal groups, at the same random offset.

    Args:
        groups: number of groups.
        detach: whether the inputs of the selected calls are constants.
        early_stop: sampling stops uniformly among the last ``early_stop`` steps; later steps are dropped.
        randint: samples the offset and the last step.
    """

    def __init__(
        self, groups: int, *, detach: bool = True, early_stop: int = 1, randint: RandInt = synced_randint(Runtime())
    ):
        self.groups, self.detach, self.early_stop, self.randint = groups, detach, early_stop, randint

    def select(self, num_steps: int) -> GradientSteps:
        check_groups(num_steps, self.groups, self.early_stop)
        size = num_steps // self.groups
        steps = range(self.randint(0, size - 1), num_steps, size)
        length = _length(num_steps, self.early_stop, self.randint)
        return GradientSteps(tuple(step for step in steps if step < length), self.detach, length)


class Last:
    """The last steps.

    Args:
        k: number of steps; None for all.
        min_steps: if given, the number of steps is random, from ``min_steps`` to ``k``.
        detach: whether the inputs of the selected calls are constants.
        early_stop: sampling stops uniformly among the last ``early_stop`` steps.
        copies: number of re-noised copies of each sample; see `GradientSteps`.
        randint: samples the number of steps and the last step.
    """

    def __init__(
        self,
        k: int | None,
        *,
        min_steps: int | None = None,
        detach: bool = True,
        early_stop: int = 1,
        copies: int = 0,
        randint: RandInt = synced_randint(Runtime()),
    ):
        self.k, self.min_steps = k, min_steps
        self.detach, self.early_stop, self.copies, self.randint = detach, early_stop, copies, randint

    def select(self, num_steps: int) -> GradientSteps:
        k = self.k or num_steps
        check_last(num_steps, k, self.min_steps, self.early_stop)
        k = k if self.min_steps is None else self.randint(self.min_steps, k)
        length = _length(num_steps, self.early_stop, self.randint)
        return GradientSteps(tuple(range(length - k, length)), self.detach, length, self.copies)


class All(Last):
    """Every step.

    Args:
        detach: whether the inputs of the calls are constants.
    """

    def __init__(self, *, detach: bool = True):
        super().__init__(None, detach=detach)


def _length(num_steps: int, early_stop: int, randint: RandInt) -> int:
    return num_steps if early_stop == 1 else randint(num_steps - early_stop + 1, num_steps)
