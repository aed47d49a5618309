"""The trainer `dpo`: direct preference optimization of a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from longalign.backbones import Backbone
from longalign.encoders import Encoder
from longalign.functional import add_noise, sample_timesteps, training_target
from longalign.runtime import Runtime
from longalign.trainers import DiffusionTrainer, train_denoiser
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from longalign_dpo.config import DPOConfig


def preference_logits(errors: Tensor, reference_errors: Tensor, beta: float) -> Tensor:
    """Returns the log-odds ``(b,)`` that the first image of a pair is preferred, according to the trained model.

    They are the argument of the sigmoid in arXiv 2311.12908, eq. 14: ``-beta / 2 (c_1 - c_2)``. Here ``c_i`` is the
    denoising error of the trained model minus that of the reference model for image i, and ``beta / 2`` stands for the
    paper's ``beta T omega(lambda_t)``.

    Args:
        errors: ``(b, 2)`` mean squared errors of the trained model's predictions for the two images.
        reference_errors: ``(b, 2)`` mean squared errors of the reference model's predictions.
        beta: strength of the KL divergence from the reference model.
    """
    first, second = (errors - reference_errors).unbind(1)
    return -beta / 2 * (first - second)


class DPOTrainer(DiffusionTrainer):
    """Makes the denoising error of preferred images smaller than that of rejected ones, relative to a reference model.

    Both images of a pair get the same noise and timestep. The loss is the cross-entropy between the fraction
    of annotators who prefer the first image and the trained model's probability of this preference, see
    `preference_logits`. If all annotators prefer one image, this is Diffusion-DPO's loss. A tie (fraction 0.5) has no
    gradient at the start of the training.

    Args:
        backbone: backbone whose trainable parameters and reference model are already set.
        encoder: encodes the prompts; frozen.
        beta: strength of the KL divergence from the reference model.
        timesteps: sampling density of the timesteps, ``"uniform"`` or ``"logit-normal"``. None selects
            ``"logit-normal"`` for flow-matching models and ``"uniform"`` for others.
    """

    def __init__(self, backbone: Backbone, encoder: Encoder, *, beta: float, timesteps: str | None):
        super().__init__(backbone, encoder, train_adapter=False)
        self.beta = beta
        self.timesteps = timesteps or ("logit-normal" if backbone.prediction == "flow" else "uniform")

    @classmethod
    def from_config(cls, config: DPOConfig, runtime: Runtime, *, backbone: Backbone, encoder: Encoder) -> DPOTrainer:
        """Adds a new LoRA to the backbone, or makes all of the denoiser's weights trainable, and builds the trainer.

        In the second case, a copy of the weights is kept as the reference model.
        """
        if config.lora is None:
            backbone.keep_reference_model()
        train_denoiser(backbone, config.lora, "dpo")
        return cls(backbone, encoder, beta=config.beta, timesteps=config.timesteps)

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns ``dpo_loss`` and metrics, tensors ``()`` by name.

        The change of an image is the trained model's denoising error for it minus that of the reference model.

        - ``accuracy``: fraction of pairs whose preferred image has the smaller change; a tie counts half.
        - ``margin``: mean log-odds of the preferred image, 0 for a tie; see `preference_logits`.
        - ``preferred_change``: mean change of the preferred images, of the second image for a tie. It may rise while
          the loss falls.

        Args:
            batch: dict with b texts ``prompt``, images ``image`` ``(b, 2, 3, h, w)`` in [0, 1], and ``preference``
                ``(b,)``, the fraction of annotators who prefer the first image; 0.5 is a tie.
        """
        backbone, count = self.backbone, len(batch["prompt"])
        latents = backbone.encode_images(batch["image"].flatten(0, 1))
        preference = batch["preference"].to(latents)
        levels = backbone.levels_at(latents.shape[1:])
        # the same noise and timestep for both images of a pair
        noise = torch.randn_like(latents[:count]).repeat_interleave(2, dim=0)
        timesteps = sample_timesteps(self.timesteps, levels, count, latents.device).repeat_interleave(2)
        rows = torch.arange(count, device=latents.device).repeat_interleave(2)
        inputs = add_noise(levels, latents, noise, timesteps), timesteps, self.encode(batch["prompt"])[rows]
        target = training_target(backbone.prediction, levels, latents, noise, timesteps).float()

        def errors(prediction: Tensor) -> Tensor:
            return (prediction.float() - target).square().flatten(1).mean(1).view(count, 2)

        reference = errors(backbone.predict_reference(*inputs))
        model = errors(backbone.predict(*inputs))
        logits = preference_logits(model, reference, self.beta)
        with torch.no_grad():
            sign, change = (preference - 0.5).sign(), model - reference
            correct = torch.where(sign == 0, 0.5, (sign * logits > 0).to(logits))
            preferred = torch.where(preference > 0.5, change[:, 0], change[:, 1])
            metrics = {"accuracy": correct, "margin": sign * logits, "preferred_change": preferred}
        loss = binary_cross_entropy_with_logits(logits, preference.to(logits))
        return {"dpo_loss": loss, **{key: value.mean() for key, value in metrics.items()}}
