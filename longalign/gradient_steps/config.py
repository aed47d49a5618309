"""Configs of the kind ``gradient_steps``; importing this module does not import torch.

`grouped-random`, `last` and `all` are general; the others are methods of papers, under the papers' names.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from longalign.registry import PartConfig
from longalign.runtime import Runtime


def check_groups(num_steps: int, groups: int, early_stop: int = 1) -> None:
    """Raises ValueError if the steps cannot be divided, or an early stop can leave no selected step."""
    if num_steps % groups:
        raise ValueError(f"{num_steps} sampling steps cannot be divided into {groups} equal groups")
    if num_steps - early_stop + 1 < num_steps // groups:
        raise ValueError(
            f"an early stop within the last {early_stop} of {num_steps} sampling steps can leave no selected step; "
            f"expected early_stop of at most {num_steps - num_steps // groups + 1}"
        )


def check_last(num_steps: int, k: int, min_steps: int | None = None, early_stop: int = 1) -> None:
    """Raises ValueError if there are fewer than ``k`` steps, or an early stop can leave fewer."""
    required = max(k, min_steps or 1)
    if required > num_steps:
        raise ValueError(
            f"cannot select the last {required} of {num_steps} sampling steps; expected at most {num_steps}"
        )
    if k > num_steps - early_stop + 1:
        raise ValueError(
            f"an early stop within the last {early_stop} of {num_steps} sampling steps can leave fewer than {k}; "
            f"expected early_stop of at most {num_steps - k + 1}"
        )


class GradientStepsConfig(PartConfig):
    """Base of configs of methods that select the gradient-carrying steps."""

    def check_steps(self, num_steps: int) -> None:
        """Raises ValueError if the config does not allow ``num_steps`` sampling steps."""

    def detaches(self) -> bool:
        """Whether the inputs of the selected calls are constants; several can then be replayed in one call."""
        return getattr(self, "detach", True)


class GroupedRandomConfig(GradientStepsConfig):
    """One step in each of several equal groups, at the same random offset (LongAlign, section 4).

    For 50 steps in 5 groups: r, 10 + r, 20 + r, 30 + r and 40 + r with r in 0..9.

    Attributes:
        groups: number of groups, equal to the number of gradient-carrying steps.
        detach: whether the inputs of these steps are constants, as in the paper.
    """

    name: Literal["grouped-random"] = "grouped-random"
    groups: int = Field(5, ge=1)
    detach: bool = True

    def check_steps(self, num_steps: int) -> None:
        check_groups(num_steps, self.groups)

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import GroupedRandom, synced_randint

        return GroupedRandom(self.groups, detach=self.detach, randint=synced_randint(runtime))


class DRTuneConfig(GradientStepsConfig):
    """DRTune (arXiv 2405.00760): equidistant steps from a random offset, with constant inputs.

    Sampling stops at a random late step, and its predicted image is scored.

    Attributes:
        groups: number of gradient-carrying steps; those after the stop are dropped.
        early_stop: sampling stops uniformly among the last ``early_stop`` steps; 1 means no early stop.
    """

    name: Literal["drtune"] = "drtune"
    groups: int = Field(5, ge=1)
    early_stop: int = Field(10, ge=1)

    def check_steps(self, num_steps: int) -> None:
        check_groups(num_steps, self.groups, self.early_stop)

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import GroupedRandom, synced_randint

        return GroupedRandom(self.groups, early_stop=self.early_stop, randint=synced_randint(runtime))


class LastConfig(GradientStepsConfig):
    """The last steps.

    Attributes:
        k: number of gradient-carrying steps.
        detach: whether the inputs of these steps are constants.
    """

    name: Literal["last"] = "last"
    k: int = Field(1, ge=1)
    detach: bool = True

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, self.k)

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import Last

        return Last(self.k, detach=self.detach)


class DraftKConfig(GradientStepsConfig):
    """DRaFT-K (arXiv 2309.17400): the last steps, with gradient through their inputs.

    For DRaFT, use ``all`` with ``detach: false``.

    Attributes:
        k: number of gradient-carrying steps.
    """

    name: Literal["draft-k"] = "draft-k"
    k: int = Field(1, ge=1)

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, self.k)

    def detaches(self) -> bool:
        return False

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import Last

        return Last(self.k, detach=False)


class DraftLVConfig(GradientStepsConfig):
    """DRaFT-LV (arXiv 2309.17400): the last step, also of re-noised copies of the sample, for lower gradient variance.

    The gradient is the mean over sample and copies, so that learning rates stay comparable; the paper uses the sum.

    Attributes:
        copies: number of copies of each sample.
    """

    name: Literal["draft-lv"] = "draft-lv"
    copies: int = Field(2, ge=1)

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import Last

        return Last(1, copies=self.copies)


class AlignPropConfig(GradientStepsConfig):
    """AlignProp (arXiv 2310.03739): a random number of last steps, with gradient through their inputs.

    Attributes:
        min_steps: minimum number of gradient-carrying steps.
        max_steps: maximum number of gradient-carrying steps; null means all.
    """

    name: Literal["align-prop"] = "align-prop"
    min_steps: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_range(self) -> AlignPropConfig:
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(f"expected max_steps of at least min_steps, {self.min_steps}, got {self.max_steps}")
        return self

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, self.max_steps or num_steps, self.min_steps)

    def detaches(self) -> bool:
        return False

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import Last, synced_randint

        return Last(self.max_steps, min_steps=self.min_steps, detach=False, randint=synced_randint(runtime))


class ReFLConfig(GradientStepsConfig):
    """ReFL (arXiv 2304.05977, algorithm 1): only the last step carries gradient.

    Sampling stops at a random late step, and its predicted image is scored.

    Attributes:
        early_stop: sampling stops uniformly among the last ``early_stop`` steps; 1 means no early stop.
    """

    name: Literal["refl"] = "refl"
    early_stop: int = Field(10, ge=1)

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, 1, early_stop=self.early_stop)

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import Last, synced_randint

        return Last(1, early_stop=self.early_stop, randint=synced_randint(runtime))


class AllConfig(GradientStepsConfig):
    """Every step.

    Attributes:
        detach: whether the inputs of the steps are constants; false gives DRaFT (arXiv 2309.17400).
    """

    name: Literal["all"] = "all"
    detach: bool = True

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import All

        return All(detach=self.detach)
