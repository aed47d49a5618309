"""The config of the trainer `grpo`. It does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from longalign.backbones import LoraConfig
from longalign.sizes import ImageSize, Size, parse_size
from longalign.trainers import TrainerConfig
from pydantic import Field, model_validator


class GRPOConfig(TrainerConfig):
    """Policy gradient with groups of samples (Flow-GRPO, arXiv 2505.05470; DanceGRPO, 2505.07818; DDPO, 2305.13301).

    A group is several images of one prompt. Sampling is stochastic, so each sampling step has a known probability.
    Training makes steps more likely if their image has a higher reward than the mean of its group. Only the values of
    rewards are used, so rewards need no gradient.
    """

    target: ClassVar[str] = "longalign_grpo.trainer:GRPOTrainer"
    uses_rewards: ClassVar[bool] = True

    name: Literal["grpo"] = "grpo"
    lora: LoraConfig | None = LoraConfig(dropout=0.0)
    """the LoRA to train, without dropout; null: train all weights of the denoiser. The encoder's adapter is frozen."""
    num_steps: int = Field(20, ge=2)
    """number of sampling steps. The last step is deterministic, so it has no probability and is not trained."""
    eta: float = Field(1.0, gt=0, le=1)
    """scale of the noise that DDIM adds in each sampling step (arXiv 2010.02502, eq. 16); 1 is ancestral sampling, as
    in DDPO. For flow-matching models, the noise scale ``a`` of Flow-GRPO is about ``sqrt(2) eta``: its ``a = 0.7`` is
    ``eta: 0.5``.
    """
    guidance: float = Field(7.5, ge=1)
    """classifier-free guidance scale in sampling and in training; 1 disables guidance."""
    resolution: ImageSize | None = None
    """size of the samples in pixels: the side of a square, or ``WIDTHxHEIGHT``; null: the backbone's native resolution.
    """
    group_size: int = Field(8, ge=2)
    """number of images per prompt. ``loop.batch_size`` is the number of prompts."""
    train_steps: int | None = Field(None, ge=1)
    """number of sampling steps to train, chosen at random for each batch of samples, as in DanceGRPO; null: all but the
    last.
    """
    updates: int = Field(1, ge=1)
    """number of optimizer steps for each batch of samples. Values above 1 need less sampling, but after the first step
    the samples are not those of the current model. The prompts of the data for the further steps are skipped. Values
    above 1 require a single process.
    """
    clip_range: float = Field(1e-4, gt=0)
    """the ratio between the current probability of a sampling step and that when it was sampled is clipped to 1 plus or
    minus this value, as in PPO (arXiv 1707.06347). The ratio is the geometric mean over the latent's elements, as in
    the published code. No effect in the first optimizer step for a batch of samples, where all ratios are 1.
    """
    advantage_clip: float = Field(5.0, gt=0)
    """maximum absolute advantage of an image. The advantage is the difference of its reward from the mean of its group,
    divided by the group's standard deviation.
    """
    kl_weight: float = Field(0.0, ge=0)
    """factor of the KL divergence from the reference model, which is the model before this training, in each sampling
    step; a mean over the latent's elements.
    """
    denoise_batch: int | None = Field(None, ge=1)
    """number of images per call of the denoiser or decoder; null: all. Smaller values save memory."""

    @model_validator(mode="after")
    def _check_compatible(self) -> GRPOConfig:
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout is {self.lora.dropout}, but with dropout the probabilities of the sampled steps are not "
                "those of the trained model; set lora.dropout to 0"
            )
        if self.train_steps is not None and self.train_steps >= self.num_steps:
            raise ValueError(
                f"train_steps is {self.train_steps}, but of {self.num_steps} sampling steps all but the last can be "
                f"trained; set it to at most {self.num_steps - 1}, or to null"
            )
        return self

    @property
    def image_sizes(self) -> dict[str, list[Size]]:
        return {} if self.resolution is None else {"resolution": [parse_size(self.resolution)]}

    @property
    def needs_images(self) -> bool:
        return False

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        problems = [] if run.rewards else [("rewards", "'grpo' needs at least one reward, got none; set rewards")]
        if self.updates > 1 and run.loop.accumulation > 1:
            message = (
                f"got {run.loop.accumulation} with trainer.updates {self.updates}, but only optimizer steps can use "
                "samples several times, not micro-steps; set one of these keys to 1"
            )
            problems.append(("loop.accumulation", message))
        return problems
