"""Base class of the configs of methods that select the gradient steps: the sampling steps that receive gradient."""

from __future__ import annotations

from longalign.registry import PartConfig


class GradientStepsConfig(PartConfig):
    """Base class of configs of methods that select the gradient steps: the sampling steps that receive gradient."""

    def check_steps(self, num_steps: int) -> None:
        """Raises ValueError if no gradient steps can be selected among ``num_steps`` sampling steps.

        Examples are too few steps, or steps that cannot be divided into equal groups. The base class accepts any
        number.
        """

    def detaches(self) -> bool:
        """Whether the denoiser's inputs at the gradient steps are detached; see ``detach`` of `GradientSteps`."""
        return True
