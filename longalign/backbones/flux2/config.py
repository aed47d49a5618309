"""Config of the backbone `flux2`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.backbones.config import ImageSizeConfig


class Flux2Config(ImageSizeConfig):
    """FLUX.2-dev, FLUX.2-klein, or any model with the same layout: a transformer trained with flow matching.

    The encoder is ``llm`` with the model's checkpoint, three layers and ``pad_to: 512``; docs/published-models.md has
    its settings for each model. FLUX.2-dev takes the guidance scale as an input. FLUX.2-dev and the distilled
    FLUX.2-klein are sampled without classifier-free guidance: set the trainer's ``guidance`` and ``--guidance`` to 1.
    """

    target: ClassVar[str] = "longalign.backbones.flux2.backbone:Flux2Backbone"
    has_pooled: ClassVar[bool | None] = False

    name: Literal["flux2"] = "flux2"
    checkpoint: str
    """Hub id, e.g. ``black-forest-labs/FLUX.2-klein-base-4B``, or local folder in diffusers layout."""
    guidance: float | None = Field(default=None, ge=0)
    """guidance scale that the transformer is conditioned on. null: 4 for FLUX.2-dev; FLUX.2-klein takes none."""

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("joint_attention_dim"), None
