"""Base class of configs of kind ``gradient_steps``."""

from __future__ import annotations

from longalign.registry import PartConfig


class GradientStepsConfig(PartConfig):
    """Base class of configs of methods that select the gradient steps: the sampling steps that receive gradient."""

    def check_steps(self, num_steps: int) -> None:
        """Raises ValueError if ``num_steps`` is too small for this config, or not divisible as the config requires."""

    def detaches(self) -> bool:
        """Whether the denoiser's inputs are detached, so that several steps can be recomputed in one call."""
        return True
