"""The base class of configs of the kind ``gradient_steps``."""

from __future__ import annotations

from longalign.registry import PartConfig


class GradientStepsConfig(PartConfig):
    """Base class of configs of methods that select the gradient-carrying steps."""

    def check_steps(self, num_steps: int) -> None:
        """Raises ValueError if the config does not allow ``num_steps`` sampling steps."""

    def detaches(self) -> bool:
        """Whether the inputs of the selected calls are constants; several can then be replayed in one call."""
        return True
