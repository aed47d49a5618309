"""The base class of backbone configs, and the config of LoRAs; importing this module does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.registry import PartConfig, Section


class LoraConfig(Section):
    """Low-rank updates of every Linear and Conv2d inside ResnetBlock2D, Attention and GEGLU (arXiv 2106.09685).

    ``down`` is initialised from N(0, 1/rank^2) and ``up`` with zeros, so the update is zero at the start.
    """

    rank: int = Field(default=32, ge=1)
    """width of the bottleneck."""
    scale: float = Field(default=1.0, gt=0)
    """factor of the update."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """dropout probability in the update during training."""
    dropout_placement: Literal["down", "up"] = "down"
    """``"down"`` drops inputs of the down projection, as in peft; ``"up"`` drops outputs of the up projection, as in
    the LongAlign authors' code.
    """


class BackboneConfig(PartConfig):
    """Base class of backbone configs."""

    #: whether the denoiser takes a pooled embedding of the prompt; None if unknown
    has_pooled: ClassVar[bool | None] = None
    #: folder of the denoiser in a checkpoint in diffusers layout, and its prefix in LoRA files
    component: ClassVar[str] = "unet"

    @property
    def divisor(self) -> int | None:
        """Divisor of an image's height and width in pixels; None if unknown."""
        return None

    def resolution(self) -> int | None:
        """Native width and height of an image in pixels; None if unknown. It does not load weights."""
        return None

    def widths(self) -> tuple[int | None, int | None]:
        """Widths of the states and of the pooled embedding that the denoiser takes; None if unknown."""
        return None, None
