"""General methods that select the sampling steps that receive gradient; see `papers` for those of papers.

Importing this module does not import torch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.gradient_steps.base import GradientSteps
from longalign.gradient_steps.config import GradientStepsConfig
from longalign.gradient_steps.random import RandInt, synced_randint
from longalign.runtime import Runtime


class GroupedRandomConfig(GradientStepsConfig):
    """In each of several equal groups of successive sampling steps, the step at a random offset receives gradient.

    The offset is the same in all groups (LongAlign, arXiv 2410.11817, section 4). For 50 steps in 5 groups, these are
    steps r, 10 + r, 20 + r, 30 + r and 40 + r with random r from 0 to 9.
    """

    target: ClassVar[str] = "longalign.gradient_steps.general:GroupedRandom"

    name: Literal["grouped-random"] = "grouped-random"
    groups: int = Field(5, ge=1)
    """number of groups, which must divide the number of sampling steps; one step of each group receives gradient."""
    detach: bool = True
    """whether the denoiser's inputs at these steps are detached, as in the paper; false: gradient also flows through
    the inputs to earlier steps.
    """

    def check_steps(self, num_steps: int) -> None:
        check_groups(num_steps, self.groups)

    def detaches(self) -> bool:
        return self.detach


class LastConfig(GradientStepsConfig):
    """Only the last ``k`` sampling steps receive gradient."""

    target: ClassVar[str] = "longalign.gradient_steps.general:Last"

    name: Literal["last"] = "last"
    k: int = Field(1, ge=1)
    """number of sampling steps at the end that receive gradient."""
    detach: bool = True
    """whether the denoiser's inputs at these steps are detached; false: gradient also flows through the inputs to
    earlier steps.
    """

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, self.k)

    def detaches(self) -> bool:
        return self.detach


class AllConfig(GradientStepsConfig):
    """All sampling steps receive gradient."""

    target: ClassVar[str] = "longalign.gradient_steps.general:All"

    name: Literal["all"] = "all"
    detach: bool = True
    """whether the denoiser's inputs are detached; false: gradient also flows through the inputs to earlier steps, as in
    DRaFT (arXiv 2309.17400).
    """

    def detaches(self) -> bool:
        return self.detach


class GroupedRandom:
    """Selects one sampling step of each of several equal groups, at the same random offset in all groups.

    Args:
        groups: number of groups of successive steps.
        detach: whether the denoiser's inputs at the gradient steps are detached.
        randint: ``randint(low, high)`` returns a random integer from low to high, both inclusive.
        early_stop: sampling ends with a step sampled uniformly from the last ``early_stop`` steps. Later gradient steps
            are dropped. 1 disables the early stop.
    """

    def __init__(self, groups: int, *, detach: bool, randint: RandInt, early_stop: int = 1):
        self.groups, self.detach, self.early_stop, self.randint = groups, detach, early_stop, randint

    @classmethod
    def from_config(cls, config: GroupedRandomConfig, runtime: Runtime) -> GroupedRandom:
        """Builds the selector; all processes select the same steps."""
        return cls(config.groups, detach=config.detach, randint=synced_randint(runtime))

    def select(self, num_steps: int) -> GradientSteps:
        check_groups(num_steps, self.groups, self.early_stop)
        size = num_steps // self.groups
        steps = range(self.randint(0, size - 1), num_steps, size)
        length = _length(num_steps, self.early_stop, self.randint)
        return GradientSteps(tuple(step for step in steps if step < length), self.detach, length)


class Last:
    """Selects the last ``k`` of the sampling steps that are taken.

    Args:
        k: number of gradient steps; None for all steps.
        detach: whether the denoiser's inputs at the gradient steps are detached.
        randint: ``randint(low, high)`` returns a random integer from low to high, both inclusive.
        min_steps: if given, the number of gradient steps is sampled with ``randint``, from ``min_steps`` to ``k``; if
            None, the number is ``k``.
        early_stop: sampling ends with a step sampled uniformly from the last ``early_stop`` steps; 1 disables the early
            stop.
        copies: number of re-noised copies of each sample; see `GradientSteps`.
    """

    def __init__(
        self,
        k: int | None,
        *,
        detach: bool,
        randint: RandInt,
        min_steps: int | None = None,
        early_stop: int = 1,
        copies: int = 0,
    ):
        self.k, self.min_steps = k, min_steps
        self.detach, self.early_stop, self.copies, self.randint = detach, early_stop, copies, randint

    @classmethod
    def from_config(cls, config: LastConfig, runtime: Runtime) -> Last:
        """Builds the selector from its config."""
        return cls(config.k, detach=config.detach, randint=synced_randint(runtime))

    def select(self, num_steps: int) -> GradientSteps:
        k = self.k or num_steps
        check_last(num_steps, k, self.min_steps, self.early_stop)
        k = k if self.min_steps is None else self.randint(self.min_steps, k)
        length = _length(num_steps, self.early_stop, self.randint)
        return GradientSteps(tuple(range(length - k, length)), self.detach, length, self.copies)


class All:
    """Selects all sampling steps.

    Args:
        detach: whether the denoiser's inputs are detached at all steps.
    """

    def __init__(self, *, detach: bool):
        self.detach = detach

    @classmethod
    def from_config(cls, config: AllConfig, runtime: Runtime) -> All:
        """Builds the selector from its config."""
        return cls(detach=config.detach)

    def select(self, num_steps: int) -> GradientSteps:
        return GradientSteps(tuple(range(num_steps)), self.detach, num_steps)


def check_groups(num_steps: int, groups: int, early_stop: int = 1) -> None:
    """Raises ValueError if `GroupedRandom` may select no gradient step, or cannot divide the steps into equal groups.

    Args:
        num_steps: number of sampling steps.
        groups: number of groups of successive steps.
        early_stop: sampling may end with any of the last ``early_stop`` steps; 1: no early stop.
    """
    if num_steps % groups:
        raise ValueError(
            f"{num_steps} sampling steps cannot be divided into {groups} equal groups; change num_steps or groups"
        )
    if num_steps - early_stop + 1 < num_steps // groups:
        raise ValueError(
            f"an early stop within the last {early_stop} of {num_steps} sampling steps can leave no gradient step; "
            f"set an early_stop of at most {num_steps - num_steps // groups + 1}"
        )


def check_last(num_steps: int, k: int, min_steps: int | None = None, early_stop: int = 1) -> None:
    """Raises ValueError if `Last` cannot select its gradient steps.

    Args:
        num_steps: number of sampling steps.
        k: number, or maximum number, of gradient steps.
        min_steps: minimum number of gradient steps, if the number is random; else None.
        early_stop: sampling may end with any of the last ``early_stop`` steps; 1: no early stop.
    """
    required = max(k, min_steps or 1)
    if required > num_steps:
        raise ValueError(
            f"the last {required} of {num_steps} sampling steps cannot receive gradient; set k, min_steps and "
            f"max_steps of gradient_steps to at most {num_steps}, or raise num_steps"
        )
    if k > num_steps - early_stop + 1:
        raise ValueError(
            f"an early stop within the last {early_stop} of {num_steps} sampling steps can leave fewer than {k} steps; "
            f"set an early_stop of at most {num_steps - k + 1}"
        )


def _length(num_steps: int, early_stop: int, randint: RandInt) -> int:
    return num_steps if early_stop == 1 else randint(num_steps - early_stop + 1, num_steps)
