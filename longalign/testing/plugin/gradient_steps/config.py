"""The config of `my-part`. Neither the config nor the part imports torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.gradient_steps import GradientStepsConfig


class MyPartConfig(GradientStepsConfig):
    """Selects ``k`` successive sampling steps that receive gradient, from a random first one. Replace it with yours."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    name: Literal["my-part"] = "my-part"
    k: int = Field(2, ge=1)
    """Number of sampling steps that receive gradient."""

    def check_steps(self, num_steps: int) -> None:
        if num_steps < self.k:
            raise ValueError(f"expected at least k = {self.k} sampling steps, got {num_steps}; lower k")
