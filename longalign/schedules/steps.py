"""The built-in schedules: steps spread over the sampling, or the last ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longalign.runtime import Runtime
from longalign.schedules.base import Choice
from longalign.schedules.configs import check_groups, check_last

#: ``(low, high) -> a random integer from low to high``, both included
Draw = Callable[[int, int], int]


def agreed(runtime: Runtime) -> Draw:
    """Random integers by torch's global CPU generator, in several processes those of the first one."""

    def draw(low: int, high: int) -> int:
        number = torch.randint(low, high + 1, (1,))
        return int(runtime.gather(number.to(runtime.device))[0])

    return draw


class GroupedRandom:
    """One step in each of equal groups, at the same random offset.

    Args:
        groups: how many.
        detach: whether the latents that enter the chosen calls are constants.
        early_stop: the last step that is taken is one of so many last steps, at random; chosen steps behind it fall
            away.
        draw: draws the offset and the last step.
    """

    def __init__(self, groups: int, *, detach: bool = True, early_stop: int = 1, draw: Draw = agreed(Runtime())):
        self.groups, self.detach, self.early_stop, self.draw = groups, detach, early_stop, draw

    def pick(self, num_steps: int) -> Choice:
        check_groups(num_steps, self.groups, self.early_stop)
        size = num_steps // self.groups
        steps = range(self.draw(0, size - 1), num_steps, size)
        length = _length(num_steps, self.early_stop, self.draw)
        return Choice(tuple(step for step in steps if step < length), self.detach, length)


class Last:
    """The last steps.

    Args:
        k: how many; None for all.
        least: if given, their number is random, from ``least`` to ``k``.
        detach: whether the latents that enter the chosen calls are constants.
        early_stop: the last step that is taken is one of so many last steps, at random.
        copies: how often each sample is noised again and predicted once more.
        draw: draws the number of steps and the last step.
    """

    def __init__(
        self,
        k: int | None,
        *,
        least: int | None = None,
        detach: bool = True,
        early_stop: int = 1,
        copies: int = 0,
        draw: Draw = agreed(Runtime()),
    ):
        self.k, self.least = k, least
        self.detach, self.early_stop, self.copies, self.draw = detach, early_stop, copies, draw

    def pick(self, num_steps: int) -> Choice:
        k = self.k or num_steps
        check_last(num_steps, k, self.least, self.early_stop)
        k = k if self.least is None else self.draw(self.least, k)
        length = _length(num_steps, self.early_stop, self.draw)
        return Choice(tuple(range(length - k, length)), self.detach, length, self.copies)


class All(Last):
    """Every step.

    Args:
        detach: whether the latents that enter the calls are constants.
    """

    def __init__(self, *, detach: bool = True):
        super().__init__(None, detach=detach)


def _length(num_steps: int, early_stop: int, draw: Draw) -> int:
    return num_steps if early_stop == 1 else draw(num_steps - early_stop + 1, num_steps)
