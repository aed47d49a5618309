"""The config of the trainer `dpo`. It does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from longalign.backbones import LoraConfig
from longalign.trainers import TrainerConfig
from pydantic import Field


class DPOConfig(TrainerConfig):
    """Direct preference optimization on pairs of images of a prompt (Diffusion-DPO, arXiv 2311.12908).

    The run's data must have two images per prompt with a preference: `pairs`, `hf-pairs` or `scene-pairs`. The run has
    no rewards.
    """

    target: ClassVar[str] = "longalign_dpo.trainer:DPOTrainer"
    compares_pairs: ClassVar[bool] = True

    name: Literal["dpo"] = "dpo"
    lora: LoraConfig | None = LoraConfig()
    """the LoRA to train; null: train all weights of the denoiser, and keep a copy of them as the reference model. The
    reference model is the model before this training. The encoder's adapter is frozen.
    """
    beta: float = Field(5000.0, gt=0)
    """strength of the KL divergence from the reference model; larger values keep the trained model closer to it. As in
    the published code, it contains the factor T, the number of timesteps, of the paper's eq. 14, and errors are means
    over the latent's elements.
    """
    timesteps: Literal["uniform", "logit-normal"] | None = None
    """sampling density of the training timesteps: ``"uniform"``, or ``"logit-normal"``, with more samples at middle
    noise levels. null: logit-normal for flow-matching models, uniform for others.
    """

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        if run.cache is None or run.cache.latents is False:
            return []
        return [("cache.latents", "latents of pairs cannot be cached; set it to false")]
