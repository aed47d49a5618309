"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.backbones import LoraConfig
from longalign.trainers import TrainerConfig


class MyPartConfig(TrainerConfig):
    """Fine-tuning with the diffusion loss, multiplied by a factor. Replace it with your method."""

    target: ClassVar[str] = "my_plugin.part:MyPart"
    needs: ClassVar[tuple[str, ...]] = ("backbone", "encoder")

    name: Literal["my-part"] = "my-part"
    lora: LoraConfig | None = LoraConfig()
    """The LoRA to train, or null to train all weights of the denoiser."""
    weight: float = Field(1.0, gt=0)
    """Factor of the diffusion loss."""
