"""Config of the backbone `flux`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.backbones.config import ImageSizeConfig


class FluxConfig(ImageSizeConfig):
    """FLUX.1, or any model with the same layout: a transformer trained with flow matching.

    FLUX.1-dev is distilled from a guided model and takes the guidance scale as an input, here ``guidance``. It is
    sampled without classifier-free guidance: set the trainer's key ``guidance`` and the command-line option
    ``--guidance`` to 1.
    """

    target: ClassVar[str] = "longalign.backbones.flux.backbone:FluxBackbone"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["flux"] = "flux"
    checkpoint: str
    """Hub id, e.g. ``black-forest-labs/FLUX.1-dev``, or local folder in diffusers layout."""
    guidance: float | None = Field(default=None, ge=0)
    """guidance scale that the transformer is conditioned on. null: 3.5 for FLUX.1-dev, and no guidance scale for
    FLUX.1-schnell, whose transformer takes none.
    """

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("joint_attention_dim"), self.number_of("pooled_projection_dim")
