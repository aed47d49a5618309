"""Fine-tuning with the diffusion loss on images with long captions (LongAlign, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.encoders.base import Encoder
from longalign.runtime import Runtime
from longalign.trainers.align.config import AlignConfig
from longalign.trainers.diffusion import DiffusionTrainer, batch_latents, noise_loss, train_denoiser


class AlignTrainer(DiffusionTrainer):
    """Trains the denoiser and the encoder's adapter to follow long captions.

    Args:
        backbone: backbone whose trainable parameters are already set.
        encoder: encodes the captions.
        caption_dropout: probability that a caption is replaced by the empty prompt, from 0 to 1.
        train_adapter: whether to train the encoder's adapter, if it has one.
        timesteps: sampling density of the timesteps, ``"uniform"`` or ``"logit-normal"``. None selects the default of
            `longalign.trainers.diffusion.noise_loss`.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        *,
        caption_dropout: float,
        train_adapter: bool,
        timesteps: str | None,
    ):
        super().__init__(backbone, encoder, train_adapter)
        self.caption_dropout, self.timesteps = caption_dropout, timesteps

    @classmethod
    def from_config(
        cls, config: AlignConfig, runtime: Runtime, *, backbone: Backbone, encoder: Encoder
    ) -> AlignTrainer:
        """Adds a new LoRA to the backbone, or makes all of the denoiser's weights trainable, and builds the trainer."""
        train_denoiser(backbone, config.lora, "align")
        return cls(
            backbone,
            encoder,
            caption_dropout=config.caption_dropout,
            train_adapter=config.train_adapter,
            timesteps=config.timesteps,
        )

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        dropped = torch.rand(len(batch["prompt"])) < self.caption_dropout
        prompts = ["" if drop else p for p, drop in zip(batch["prompt"], dropped.tolist(), strict=True)]
        latents, conditioning = batch_latents(self.backbone, batch, "'align'"), self.encode(prompts)
        return {"noise_loss": noise_loss(self.backbone, latents, conditioning, self.timesteps)}
