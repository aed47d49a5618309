"""Which sampling steps carry gradient in reward fine-tuning."""

from __future__ import annotations

from typing import Protocol

import torch


class Schedule(Protocol):
    """Chooses steps anew for each batch."""

    def pick(self, num_steps: int) -> tuple[int, ...]:
        """Indices in ascending order out of ``num_steps`` steps, of which 0 is the first, at the most noise. Random
        choices use torch's global CPU generator."""
        ...


class GroupedRandom:
    """One step in each of ``groups`` equal groups, at the same random offset."""

    def __init__(self, groups: int):
        self.groups = groups

    def pick(self, num_steps: int) -> tuple[int, ...]:
        size, rest = divmod(num_steps, self.groups)
        if rest:
            raise ValueError(f"{num_steps} sampling steps cannot be divided into {self.groups} equal groups")
        return tuple(range(int(torch.randint(size, ())), num_steps, size))


class Last:
    """The last ``k`` steps."""

    def __init__(self, k: int):
        self.k = k

    def pick(self, num_steps: int) -> tuple[int, ...]:
        if self.k > num_steps:
            raise ValueError(f"there are {num_steps} sampling steps, fewer than the last {self.k}")
        return tuple(range(num_steps - self.k, num_steps))


class All:
    """Every step."""

    def pick(self, num_steps: int) -> tuple[int, ...]:
        return tuple(range(num_steps))
