"""Configs of the ways to send the gradient back through sampling; no torch here.

`grouped-random`, `last` and `all` are general; the others are what papers do, under the papers' names.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from longalign.registry import PartConfig
from longalign.runtime import Runtime


def check_groups(num_steps: int, groups: int, early_stop: int = 1) -> None:
    """Raises ValueError if the steps cannot be divided, or an early stop can leave none that is chosen."""
    if num_steps % groups:
        raise ValueError(f"{num_steps} sampling steps cannot be divided into {groups} equal groups")
    if num_steps - early_stop + 1 < num_steps // groups:
        raise ValueError(
            f"an early stop within the last {early_stop} of {num_steps} sampling steps can leave no chosen step; "
            f"expected early_stop of at most {num_steps - num_steps // groups + 1}"
        )


def check_last(num_steps: int, k: int, min_steps: int | None = None, early_stop: int = 1) -> None:
    """Raises ValueError if there are not so many steps."""
    if max(k, min_steps or 1) > num_steps:
        raise ValueError(f"there are {num_steps} sampling steps, fewer than the last {max(k, min_steps or 1)}")
    if k > num_steps - early_stop + 1:
        raise ValueError(
            f"an early stop within the last {early_stop} of {num_steps} sampling steps can leave fewer than {k}; "
            f"expected early_stop of at most {num_steps - k + 1}"
        )


class GradientStepsConfig(PartConfig):
    """Base of the ways to choose the sampling steps that carry gradient."""

    def check_steps(self, num_steps: int) -> None:
        """Raises ValueError if there is no choice among ``num_steps`` sampling steps."""

    def detaches(self) -> bool:
        """Whether the latents that enter the chosen calls are constants; then several can be repeated in one."""
        return getattr(self, "detach", True)


class GroupedRandomConfig(GradientStepsConfig):
    """One step in each of equal groups, at the same random offset (LongAlign, section 4): of 50 steps in 5 groups
    r, 10 + r, 20 + r, 30 + r and 40 + r with r in 0..9.

    Attributes:
        groups: number of groups, which is the number of steps with gradient.
        detach: whether the latents that enter these steps are constants, as in the paper.
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
    """DRTune (arXiv 2405.00760): steps at equal distances from a random offset, with constant inputs; sampling ends at
    a random late step, whose predicted image is scored.

    Attributes:
        groups: the number of steps with gradient; one that comes after the end falls away.
        early_stop: the end is one of so many last steps, at random; 1 samples to the end.
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
        k: how many.
        detach: whether the latents that enter these steps are constants.
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
    """DRaFT-K (arXiv 2309.17400): the last steps, with gradient through their inputs; ``all`` with ``detach: false`` is
    DRaFT.

    Attributes:
        k: how many.
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
    """DRaFT-LV (arXiv 2309.17400): the last step, of the sample and of copies that are noised again to its level, for a
    gradient of lower variance. Here it is the mean over sample and copies, so that learning rates stay comparable; the
    paper takes the sum.

    Attributes:
        copies: of each sample.
    """

    name: Literal["draft-lv"] = "draft-lv"
    copies: int = Field(2, ge=1)

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import Last

        return Last(1, copies=self.copies)


class AlignPropConfig(GradientStepsConfig):
    """AlignProp (arXiv 2310.03739): a random number of last steps, with gradient through their inputs.

    Attributes:
        min_steps: steps with gradient at least.
        max_steps: steps with gradient at most, or null for all.
    """

    name: Literal["align-prop"] = "align-prop"
    min_steps: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> AlignPropConfig:
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(
                f"expected max_steps to be at least {self.min_steps}, as min_steps is, got {self.max_steps}"
            )
        return self

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, self.max_steps or num_steps, self.min_steps)

    def detaches(self) -> bool:
        return False

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import Last, synced_randint

        return Last(self.max_steps, min_steps=self.min_steps, detach=False, randint=synced_randint(runtime))


class ReFLConfig(GradientStepsConfig):
    """ReFL (arXiv 2304.05977, algorithm 1): sampling ends at a random late step, which alone carries gradient and whose
    predicted image is scored.

    Attributes:
        early_stop: the end is one of so many last steps, at random.
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
        detach: whether the latents that enter the steps are constants; if not, this is DRaFT (arXiv 2309.17400).
    """

    name: Literal["all"] = "all"
    detach: bool = True

    def build(self, runtime: Runtime) -> Any:
        from longalign.gradient_steps.steps import All

        return All(detach=self.detach)
