"""Config of the trainer `lcm`. Does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.backbones.config import LoraConfig
from longalign.errors import ConfigProblem
from longalign.trainers.config import TrainerConfig, image_problems


class LCMConfig(TrainerConfig):
    """Consistency distillation for sampling in a few steps (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556).

    The student, which is trained, samples without guidance. The teacher is the model before training: the
    checkpoint in the run's ``init_from`` or, without this key, the backbone's. Teacher and encoder are frozen.
    """

    target: ClassVar[str] = "longalign.trainers.lcm.trainer:LCMTrainer"

    name: Literal["lcm"] = "lcm"
    lora: LoraConfig | None = LoraConfig()
    """the LoRA to train; null: train all weights of the denoiser."""
    num_ddim_timesteps: int = Field(50, ge=1)
    """number of DDIM steps from noise to image; must divide the model's number of timesteps. The teacher takes one of
    these steps. With 50 steps and 1000 timesteps, each step spans 20 timesteps.
    """
    start_timesteps: Literal["all", "ddim"] = "all"
    """timesteps at which the teacher may start. ``"all"``, as in the LongAlign authors' code: all timesteps from half a
    DDIM step upwards, e.g. from 10 for 50 steps and 1000 timesteps. ``"ddim"``, as in the paper: only the timesteps of
    the DDIM steps.
    """
    w_min: float = Field(6.5, ge=0)
    """minimum guidance w of the teacher. w is sampled for each image, uniformly from ``w_min`` to ``w_max``; the
    guidance scale is 1 + w, e.g. 7.5 for w = 6.5.
    """
    w_max: float = Field(6.5, ge=0)
    """maximum guidance w of the teacher; see ``w_min``."""
    huber_c: float | None = Field(0.001, gt=0)
    """c of the pseudo-Huber loss ``sqrt(d^2 + c^2) - c`` of the difference d; null: squared error ``d^2``."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """decay of the moving average of the student. The target is computed with this average, as in the LCM paper. null:
    the target is computed with the student, as in LCM-LoRA. Independent of ``loop.ema``, which averages the saved
    weights.
    """
    timestep_scaling_factor: float = Field(10.0, gt=0)
    """factor s of the timestep t in the boundary condition: the predicted image is weighted by
    ``s t / sqrt((s t)^2 + 0.25)``, which is 0 at t = 0. Samplers use 10.
    """

    @model_validator(mode="after")
    def _check_guidance_range(self) -> LCMConfig:
        if self.w_min > self.w_max:
            raise ValueError(
                f"w_min must be at most w_max, got {self.w_min} and {self.w_max}; lower w_min or raise w_max"
            )
        return self

    def check_run(self, run: Any) -> list[ConfigProblem]:
        return image_problems(run, "'lcm'")
