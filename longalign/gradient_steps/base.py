"""The interface of the kind ``gradient_steps``: which sampling steps carry gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class GradientSteps:
    """The gradient-carrying steps of one batch.

    Attributes:
        steps: ascending indices of the steps whose denoiser calls carry gradient; 0 is the first step, with the most
            noise. The outputs of all other calls are constants.
        detach: whether the inputs of these calls are constants.
        length: number of steps to take; the last one gives the predicted ``x_0``. None takes all steps.
        copies: number of copies of each sample that are noised again to the level of the last step and predicted again,
            with gradient. The score of each copy has the same weight as that of the sample.
    """

    steps: tuple[int, ...]
    detach: bool = True
    length: int | None = None
    copies: int = 0


@runtime_checkable
class GradientStepSelector(Protocol):
    """Selects the gradient-carrying steps for each batch."""

    def select(self, num_steps: int) -> GradientSteps:
        """Selects steps among ``num_steps`` sampling steps.

        All processes must select the same number of steps, because they synchronise at each replayed call;
        `longalign.gradient_steps.random.synced_randint` samples the same number in all of them.
        """
        ...
