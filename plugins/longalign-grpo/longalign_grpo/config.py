"""The config of the trainer `grpo`. It does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from longalign.backbones import LoraConfig
from longalign.sizes import ImageSize, Size, parse_size
from longalign.trainers import TrainerConfig
from pydantic import Field, model_validator


class GRPOConfig(TrainerConfig):
    """Policy gradient with groups of samples (Flow-GRPO, arXiv 2505.05470; DanceGRPO, 2505.07818; DDPO, 2305.13301).

    Sampling is stochastic, so each step has a known probability. Steps that led to images with an above-average reward
    for their prompt become more likely. Only the values of the rewards are used, so they need no gradient.
    """

    target: ClassVar[str] = "longalign_grpo.trainer:GRPOTrainer"
    uses_rewards: ClassVar[bool] = True

    name: Literal["grpo"] = "grpo"
    lora: LoraConfig | None = LoraConfig(dropout=0.0)
    """the LoRA to train, without dropout; null: train all weights of the denoiser. The encoder's adapter is frozen."""
    num_steps: int = Field(20, ge=2)
    """number of sampling steps. The last one is deterministic and is not trained."""
    eta: float = Field(1.0, gt=0, le=1)
    """scale of the noise added in each step; 1 is ancestral sampling (DDPO). For flow-matching models, the noise scale
    ``a`` of Flow-GRPO is about ``sqrt(2) eta``; its 0.7 is 0.5 here.
    """
    guidance: float = Field(7.5, ge=1)
    """classifier-free guidance scale of sampling, and of the trained policy; 1 disables guidance."""
    resolution: ImageSize | None = None
    """size of the samples in pixels: the side of a square, or ``WIDTHxHEIGHT``; null: the backbone's native resolution.
    """
    group_size: int = Field(8, ge=2)
    """images per prompt. ``loop.batch_size`` counts prompts."""
    train_steps: int | None = Field(None, ge=1)
    """number of sampling steps to train, chosen at random for each rollout (DanceGRPO); null: all but the last."""
    updates: int = Field(1, ge=1)
    """optimizer steps on each rollout. Above 1, sampling is needed less often, but the policy has changed since. The
    prompts that the data has for the steps in between are skipped. One process only.
    """
    clip_range: float = Field(1e-4, gt=0)
    """limit of the change of a step's probability ratio, as in PPO (arXiv 1707.06347). Has no effect in the first
    update of a rollout. The ratio is that of the geometric mean over the latent's elements, as in the published code.
    """
    advantage_clip: float = Field(5.0, gt=0)
    """limit of the absolute advantage, the reward in standard deviations of its group."""
    kl_weight: float = Field(0.0, ge=0)
    """factor of the KL divergence from the reference model in each step, a mean over the latent's elements."""
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
        problems = [] if run.rewards else [("rewards", "'grpo' needs at least one reward")]
        if self.updates > 1 and run.loop.accumulation > 1:
            message = f"micro-steps are no updates of a rollout, but trainer.updates is {self.updates}; set one to 1"
            problems.append(("loop.accumulation", message))
        return problems
