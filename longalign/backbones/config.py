"""Base class of backbone configs, and the config of LoRAs. Does not import torch."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from longalign.registry import PartConfig, Section


class LoraConfig(Section):
    """Low-rank updates of the denoiser's Linear and Conv2d layers (arXiv 2106.09685).

    ``down`` is initialized from N(0, 1/rank^2) and ``up`` with zeros, so the update is zero at the start.
    """

    rank: int = Field(default=32, ge=1)
    """rank of the update."""
    scale: float = Field(default=1.0, gt=0)
    """scaling of the LoRA update (``lora_alpha / r`` in peft)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """dropout probability in the LoRA branch during training (``lora_dropout`` in peft)."""
    dropout_placement: Literal["down", "up"] = "down"
    """where dropout is applied: ``"down"`` to the input of the down projection, as in peft, or ``"up"`` to the output
    of the up projection, as in the LongAlign authors' code.
    """
    targets: Annotated[list[str], Field(min_length=1)] | str | None = None
    """layers with a LoRA: a list of names or ends of names (``[to_q, to_k, ff.net.2]``), or a regular expression that
    the whole name must match. null: all layers inside attention, and in UNets also inside ResnetBlock2D and GEGLU.
    """

    @field_validator("targets")
    @classmethod
    def _compiles(cls, targets: list[str] | str | None) -> list[str] | str | None:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(
                    f"expected a list of names or a regular expression, got {targets!r}: {error}"
                ) from None
        return targets


class BackboneConfig(PartConfig):
    """Base class of backbone configs."""

    #: whether the denoiser takes a pooled embedding of the prompt; None if unknown
    has_pooled: ClassVar[bool | None] = None
    #: folder of the denoiser in a checkpoint in diffusers layout, and its prefix in LoRA files
    component: ClassVar[str] = "unet"

    @property
    def divisor(self) -> int | None:
        """Number of pixels that image height and width must be divisible by; None if unknown."""
        return None

    def resolution(self) -> int | None:
        """Native width and height of an image in pixels, found without loading weights; None if unknown."""
        return None

    def widths(self) -> tuple[int | None, int | None]:
        """Returns the widths of the states and of the pooled embedding that the denoiser expects; None if unknown."""
        return None, None
