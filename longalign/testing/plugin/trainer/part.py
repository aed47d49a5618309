"""The trainer `my-part`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from my_plugin.config import MyPartConfig
from torch import Tensor

from longalign.backbones import Backbone
from longalign.encoders import Encoder
from longalign.runtime import Runtime
from longalign.trainers import DiffusionTrainer, batch_latents, noise_loss, train_denoiser


class MyPart(DiffusionTrainer):
    """Trains the denoiser, and the encoder's adapter if it has one, to denoise images given their captions.

    Args:
        backbone: backbone whose trainable parameters are already set.
        encoder: encodes the captions.
        weight: factor of the diffusion loss.
    """

    def __init__(self, backbone: Backbone, encoder: Encoder, *, weight: float):
        super().__init__(backbone, encoder, train_adapter=True)
        self.weight = weight

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime, *, backbone: Backbone, encoder: Encoder) -> MyPart:
        """Adds the LoRA, or makes all of the denoiser's weights trainable, and builds the trainer."""
        train_denoiser(backbone, config.lora, "my-part")
        return cls(backbone, encoder, weight=config.weight)

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns tensors ``()`` by name. Those whose name ends in ``_loss`` are minimized; others are only logged."""
        latents, conditioning = batch_latents(self.backbone, batch, "'my-part'"), self.encode(batch["prompt"])
        return {"noise_loss": self.weight * noise_loss(self.backbone, latents, conditioning)}
