"""Interface of the methods that select the gradient steps: the sampling steps that receive gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class GradientSteps:
    """Gradient steps of one batch: the sampling steps whose denoiser calls receive gradient.

    Attributes:
        steps: ascending indices of the gradient steps; 0 is the first step, with the most noise. The denoiser's outputs
            at all other steps are detached.
        detach: whether the denoiser's inputs at the gradient steps are detached. If False, gradient also flows through
            the inputs to earlier gradient steps.
        length: number of sampling steps to take; the last of them returns the predicted clean latent. None takes all
            steps.
        copies: number of copies of each sample. A copy is noised again, to the noise level of the last step, and then
            denoised in one step with gradient. The scores of a sample and of its copies have equal weight.
    """

    steps: tuple[int, ...]
    detach: bool = True
    length: int | None = None
    copies: int = 0


@runtime_checkable
class GradientStepSelector(Protocol):
    """Selects the gradient steps of each batch: the sampling steps that receive gradient."""

    def select(self, num_steps: int) -> GradientSteps:
        """Selects the gradient steps of one batch among ``num_steps`` sampling steps.

        All processes must select the same number of steps, because processes synchronize at each denoiser call with
        gradient. For random steps, use `longalign.gradient_steps.random.synced_randint`.
        """
        ...
