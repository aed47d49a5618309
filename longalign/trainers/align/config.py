"""Config of the trainer `align`. This module does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from longalign.backbones.config import LoraConfig
from longalign.errors import ConfigProblem
from longalign.trainers.config import TrainerConfig, image_problems


class AlignConfig(TrainerConfig):
    """Noise-prediction fine-tuning on images with long captions."""

    target: ClassVar[str] = "longalign.trainers.align.trainer:AlignTrainer"

    name: Literal["align"] = "align"
    lora: LoraConfig | None = LoraConfig()
    """the LoRA to train, or null to train all weights of the denoiser."""
    train_adapter: bool = True
    """whether to train the encoder's adapter too, if it has one."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """fraction of captions replaced by the empty prompt, as classifier-free guidance requires."""
    timesteps: Literal["uniform", "logit-normal"] | None = None
    """sampling density of the training timesteps: ``"uniform"``, or ``"logit-normal"``, which concentrates on
    intermediate noise levels (arXiv 2403.03206, section 3.1). null is logit-normal for flows and uniform otherwise.
    """

    def check_run(self, run: Any) -> list[ConfigProblem]:
        return image_problems(run, "'align'")
