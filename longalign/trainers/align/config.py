"""Config of the trainer `align`. Does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from longalign.backbones.config import LoraConfig
from longalign.errors import ConfigProblem
from longalign.trainers.config import TrainerConfig, image_problems


class AlignConfig(TrainerConfig):
    """Fine-tuning with the diffusion loss (noise, velocity or flow matching) on images with long captions."""

    target: ClassVar[str] = "longalign.trainers.align.trainer:AlignTrainer"

    name: Literal["align"] = "align"
    lora: LoraConfig | None = LoraConfig()
    """the LoRA to train; null: train all weights of the denoiser."""
    train_adapter: bool = True
    """whether to also train the encoder's adapter, if the encoder has one."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """probability that a caption is replaced by the empty prompt. Classifier-free guidance requires a model that was
    trained with the empty prompt.
    """
    timesteps: Literal["uniform", "logit-normal"] | None = None
    """sampling density of the training timesteps: ``"uniform"``, or ``"logit-normal"``, with more samples at
    middle noise levels (arXiv 2403.03206, section 3.1). null: logit-normal for flow-matching models, uniform for
    others.
    """

    def check_run(self, run: Any) -> list[ConfigProblem]:
        return image_problems(run, "'align'")
