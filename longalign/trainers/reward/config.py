"""Configs of the trainers `reward` and `lcm-reward`. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.backbones.config import LoraConfig
from longalign.errors import ConfigProblem
from longalign.registry import Part
from longalign.sizes import ImageSize, Size, parse_size
from longalign.trainers.config import TrainerConfig, image_problems


class RewardTrainerConfig(TrainerConfig):
    """Base class of the configs of `reward` and `lcm-reward`, which fine-tune with the gradient of rewards."""

    target: ClassVar[str] = "longalign.trainers.reward.trainer:RewardTrainer"
    uses_rewards: ClassVar[bool] = True

    lora: LoraConfig | None = LoraConfig()
    """the LoRA to train; null: train all weights of the denoiser."""
    train_adapter: bool = False
    """whether to also train the encoder's adapter, if the encoder has one; the paper freezes the adapter."""
    solver: str
    """the sampler; each subclass lists the allowed values."""
    num_steps: int = Field(50, ge=1)
    """number of sampling steps."""
    guidance: float = Field(7.5, ge=1)
    """classifier-free guidance scale; 1 disables guidance. The conditional and the unconditional prediction both
    receive gradient.
    """
    guidance_interval: tuple[float, float] | None = None
    """guidance only in steps with a noise level above the first and up to the second number (arXiv 2404.07724); null:
    in all steps. Steps without guidance compute the conditional prediction only. The level is the ratio of noise to
    signal: from 0.03 to 14.6 in Stable Diffusion 1.x and XL, where the interval 0.28 to 5.42 contains 37 of 50 steps.
    """
    gradient_steps: Part("gradient_steps") = "grouped-random"
    """which sampling steps receive gradient, and whether the gradient flows through the denoiser's inputs."""
    dropout_steps: Literal["all", "gradient"] = "all"
    """sampling steps at which the LoRA's dropout is active: ``"all"``, or only the gradient steps (``"gradient"``)."""
    resolution: ImageSize | Annotated[tuple[ImageSize, ...], Field(min_length=1)] | None = None
    """size of the samples in pixels: the side of a square, or ``WIDTHxHEIGHT``. From a list such as
    ``[512, 640x384, 384x640]``, each process chooses one size for each batch at random. null: the backbone's native
    resolution.
    """
    denoise_batch: int | None = Field(None, ge=1)
    """number of images that are sampled together; null: all images of the batch. Smaller values save memory."""
    decode_batch: int | None = Field(None, ge=1)
    """number of images that are decoded together; null: all images of the batch. Smaller values save memory, but images
    are decoded a second time in the backward pass.
    """
    replay_batch: int = Field(1, ge=1)
    """maximum number of sampling steps with gradient that are recomputed in one call of the denoiser. Values above 1
    require ``replay: recompute``, a denoiser and LoRA without dropout, and ``gradient_steps`` with detached inputs.
    """
    replay: Literal["recompute", "keep"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "recompute"
    """``"recompute"``: denoiser calls with gradient are computed a second time in the backward pass, which needs the
    memory of one call. ``"keep"``: their autograd graphs are kept, which is faster but needs the memory of all calls. A
    number: graphs are kept while they occupy at most so many GiB, at least that of one call; all other calls are
    recomputed.
    """
    regularizer: Literal["none", "kl", "pretraining"] = "none"
    """loss that limits the drift from the reference model, which is the model before this training. ``"kl"``: mean
    squared difference between the predictions of the trained and the reference model at the sampling steps with
    gradient. Up to a factor per step, this is the KL divergence of their sampling distributions. ``"pretraining"``: the
    diffusion loss on the images of the data.
    """
    regularizer_weight: float | None = Field(None, gt=0)
    """factor of the regularizer's loss; required with a regularizer, null without one."""

    @model_validator(mode="after")
    def _check_compatible(self) -> RewardTrainerConfig:
        self.gradient_steps.check_steps(self.num_steps)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high < math.inf:
                raise ValueError(
                    f"guidance_interval must be two increasing numbers, the first at least 0; got {low:g} and {high:g}"
                )
            if self.guidance == 1:
                raise ValueError("guidance_interval has no effect at guidance 1; remove it or set guidance above 1")
        if self.replay_batch > 1 and self.replay != "recompute":
            raise ValueError(
                f"replay_batch is {self.replay_batch}, but with replay '{self.replay}' calls keep their graphs one by "
                "one; set replay_batch to 1 or replay to 'recompute'"
            )
        if self.replay_batch > 1 and not self.gradient_steps.detaches():
            raise ValueError(
                f"replay_batch is {self.replay_batch}, but with gradient_steps '{self.gradient_steps.name}' gradient "
                "also flows through the denoiser's inputs, so the steps must be recomputed one at a time; set "
                "replay_batch to 1, or choose gradient_steps with detached inputs, e.g. 'grouped-random'"
            )
        if self.replay_batch > 1 and self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"replay_batch is {self.replay_batch} and lora.dropout {self.lora.dropout}, but with dropout each "
                "gradient step must be recomputed with its own random numbers; set replay_batch to 1 or lora.dropout "
                "to 0"
            )
        if self.regularizer == "none" and self.regularizer_weight is not None:
            raise ValueError(
                "regularizer_weight has no effect without a regularizer; set regularizer to 'kl' or 'pretraining'"
            )
        if self.regularizer == "kl" and self.train_adapter:
            raise ValueError(
                "the regularizer 'kl' needs a frozen adapter, since the reference model uses the adapter too; set "
                "train_adapter to false or choose 'pretraining'"
            )
        if self.regularizer != "none" and self.regularizer_weight is None:
            raise ValueError(
                f"the regularizer '{self.regularizer}' needs regularizer_weight; set it to a number above 0"
            )
        return self

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of the samples in pixels; empty for the backbone's native resolution."""
        values = self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)
        return tuple(parse_size(value) for value in values if value is not None)

    @property
    def image_sizes(self) -> Mapping[str, Sequence[Size]]:
        return {"resolution": self.sizes}

    @property
    def needs_images(self) -> bool:
        return self.regularizer == "pretraining"

    def check_run(self, run: Any) -> list[ConfigProblem]:
        problems = (
            []
            if run.rewards
            else [("rewards", f"'{self.name}' needs at least one reward; set rewards, e.g. rewards: denscore")]
        )
        problems += [
            (
                f"rewards.{i}",
                f"'{reward.name}' has no gradient with respect to the images, which '{self.name}' requires; choose a "
                "differentiable reward",
            )
            for i, reward in enumerate(run.rewards)
            if not reward.is_differentiable()
        ]
        return problems + (image_problems(run, "the regularizer 'pretraining'") if self.needs_images else [])


class RewardConfig(RewardTrainerConfig):
    """Fine-tuning with the gradient of rewards through sampling (LongAlign, section 4; DRTune, arXiv 2405.00760)."""

    name: Literal["reward"] = "reward"
    solver: Literal["ddim", "dpm++", "lcm"] = "ddim"
    """the sampler: ``"ddim"``, ``"dpm++"`` (DPM-Solver++(2M), of second order), or ``"lcm"`` for a
    consistency-distilled model.
    """


class LCMRewardConfig(RewardTrainerConfig):
    """Reward fine-tuning of a consistency-distilled model (LongAlign's LCM variant).

    Like `reward`, but by default with four sampling steps without guidance, at timesteps 999, 749, 499 and 249 of 1000.
    Fresh noise is added between the steps, and all steps receive gradient. The run's ``init_from`` must be a model
    trained by `lcm`.
    """

    name: Literal["lcm-reward"] = "lcm-reward"
    solver: Literal["lcm"] = "lcm"
    """the sampler, always ``"lcm"``; use `reward` for other models."""
    num_steps: int = Field(4, ge=1)
    guidance: float = Field(1.0, ge=1)
    """classifier-free guidance scale; 1 disables guidance, which is distilled into the weights."""
    gradient_steps: Part("gradient_steps") = "all"
