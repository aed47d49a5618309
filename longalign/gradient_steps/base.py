"""The interface of schedules: how a batch is sampled and where its gradient goes back through the sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class GradientSteps:
    """What is done with one batch.

    Attributes:
        steps: indices in ascending order of the steps whose calls of the denoiser carry gradient; 0 is the first
            step, at the most noise. The other calls' outputs are constants.
        detach: whether the latents that enter these calls are constants.
        length: the number of steps that are taken, the last of which gives the predicted ``x_0``; None for all.
        copies: how often each sample is noised again to the level of the last step and predicted once more, with
            gradient; the scores of the copies count as much as the sample's.
    """

    steps: tuple[int, ...]
    detach: bool = True
    length: int | None = None
    copies: int = 0


@runtime_checkable
class GradientStepSelector(Protocol):
    """Chooses anew for each batch."""

    def select(self, num_steps: int) -> GradientSteps:
        """The choice for ``num_steps`` sampling steps.

        In several processes all must choose equally many steps, since they wait for each other at each repeated call;
        `longalign.gradient_steps.steps.synced_randint` draws the same number in all of them.
        """
        ...
