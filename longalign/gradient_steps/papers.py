"""Methods from papers that select the sampling steps that receive gradient, under the papers' names.

Importing this module does not import torch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from longalign.gradient_steps.config import GradientStepsConfig
from longalign.gradient_steps.general import GroupedRandom, Last, check_groups, check_last
from longalign.gradient_steps.random import synced_randint
from longalign.runtime import Runtime


class DRTuneConfig(GradientStepsConfig):
    """DRTune (arXiv 2405.00760): equidistant steps from a random offset receive gradient; their inputs are detached.

    Sampling ends with a random late step, and the image predicted at that step is scored.
    """

    target: ClassVar[str] = "longalign.gradient_steps.papers:DRTune"

    name: Literal["drtune"] = "drtune"
    groups: int = Field(5, ge=1)
    """number of equal groups of successive sampling steps; one step of each group receives gradient, at the same random
    offset. Steps after the early stop are dropped.
    """
    early_stop: int = Field(10, ge=1)
    """sampling ends with a step sampled uniformly from the last ``early_stop`` steps; 1 disables the early stop."""

    def check_steps(self, num_steps: int) -> None:
        check_groups(num_steps, self.groups, self.early_stop)


class DRTune(GroupedRandom):
    """Selects equidistant sampling steps before a random early stop, as DRTune does; see `DRTuneConfig`."""

    @classmethod
    def from_config(cls, config: DRTuneConfig, runtime: Runtime) -> DRTune:  # type: ignore[override]
        """Builds the selector; all processes select the same steps."""
        return cls(config.groups, detach=True, early_stop=config.early_stop, randint=synced_randint(runtime))


class DraftKConfig(GradientStepsConfig):
    """DRaFT-K (arXiv 2309.17400): the last ``k`` steps receive gradient, also through the denoiser's inputs.

    For DRaFT, where all steps receive gradient, use the gradient steps ``all`` with ``detach: false``.
    """

    target: ClassVar[str] = "longalign.gradient_steps.papers:DraftK"

    name: Literal["draft-k"] = "draft-k"
    k: int = Field(1, ge=1)
    """number of sampling steps at the end that receive gradient."""

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, self.k)

    def detaches(self) -> bool:
        return False


class DraftK(Last):
    """Selects the last ``k`` sampling steps, as DRaFT-K does; see `DraftKConfig`."""

    @classmethod
    def from_config(cls, config: DraftKConfig, runtime: Runtime) -> DraftK:  # type: ignore[override]
        """Builds the selector from its config."""
        return cls(config.k, detach=False, randint=synced_randint(runtime))


class DraftLVConfig(GradientStepsConfig):
    """DRaFT-LV (arXiv 2309.17400): the last step receives gradient, for each sample and for re-noised copies of it.

    A copy is the sample with noise of the last step's level, denoised again in one step. The copies lower the variance
    of the gradient. The gradient is the mean over a sample and its copies; the paper uses the sum. Thus learning rates
    do not depend on the number of copies.
    """

    target: ClassVar[str] = "longalign.gradient_steps.papers:DraftLV"

    name: Literal["draft-lv"] = "draft-lv"
    copies: int = Field(2, ge=1)
    """number of re-noised copies of each sample."""


class DraftLV(Last):
    """Selects the last sampling step, for each sample and its copies, as DRaFT-LV does; see `DraftLVConfig`."""

    @classmethod
    def from_config(cls, config: DraftLVConfig, runtime: Runtime) -> DraftLV:  # type: ignore[override]
        """Builds the selector from its config."""
        return cls(1, detach=True, copies=config.copies, randint=synced_randint(runtime))


class AlignPropConfig(GradientStepsConfig):
    """AlignProp (arXiv 2310.03739): a random number of steps at the end receive gradient.

    Gradient also flows through the denoiser's inputs to earlier ones of these steps. The number is sampled uniformly
    from ``min_steps`` to ``max_steps`` for each batch.
    """

    target: ClassVar[str] = "longalign.gradient_steps.papers:AlignProp"

    name: Literal["align-prop"] = "align-prop"
    min_steps: int = Field(1, ge=1)
    """minimum number of sampling steps at the end that receive gradient."""
    max_steps: int | None = Field(None, ge=1)
    """maximum number of sampling steps at the end that receive gradient; null: all steps."""

    @model_validator(mode="after")
    def _check_range(self) -> AlignPropConfig:
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(
                f"expected max_steps of at least min_steps, {self.min_steps}, got {self.max_steps}; raise max_steps"
            )
        return self

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, self.max_steps or num_steps, self.min_steps)

    def detaches(self) -> bool:
        return False


class AlignProp(Last):
    """Selects a random number of sampling steps at the end, as AlignProp does; see `AlignPropConfig`."""

    @classmethod
    def from_config(cls, config: AlignPropConfig, runtime: Runtime) -> AlignProp:  # type: ignore[override]
        """Builds the selector; all processes select the same number of steps."""
        return cls(config.max_steps, min_steps=config.min_steps, detach=False, randint=synced_randint(runtime))


class ReFLConfig(GradientStepsConfig):
    """ReFL (arXiv 2304.05977, algorithm 1): only the last step that is taken receives gradient.

    Sampling ends with a random late step, and the image predicted at that step is scored.
    """

    target: ClassVar[str] = "longalign.gradient_steps.papers:ReFL"

    name: Literal["refl"] = "refl"
    early_stop: int = Field(10, ge=1)
    """sampling ends with a step sampled uniformly from the last ``early_stop`` steps; 1 disables the early stop."""

    def check_steps(self, num_steps: int) -> None:
        check_last(num_steps, 1, early_stop=self.early_stop)


class ReFL(Last):
    """Ends sampling with a random late step and selects only this step, as ReFL does; see `ReFLConfig`."""

    @classmethod
    def from_config(cls, config: ReFLConfig, runtime: Runtime) -> ReFL:  # type: ignore[override]
        """Builds the selector; sampling ends with the same step in all processes."""
        return cls(1, detach=True, early_stop=config.early_stop, randint=synced_randint(runtime))
