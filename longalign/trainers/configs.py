"""Configs of the built-in trainers. This module does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.backbones.configs import LoraConfig
from longalign.gradient_steps.config import GradientStepsConfig
from longalign.registry import REGISTRIES, Part
from longalign.rewards.configs import ClipLikeConfig
from longalign.runtime import Runtime
from longalign.trainers.config import TrainerConfig


def _image_problems(run: Any, caller: str) -> list[tuple[str, str]]:
    """A problem if the run's data has no images."""
    if run.data is None or run.data.has_images:
        return []
    return [("data", f"{caller} needs images, and '{run.data.name}' has prompts only; choose data with images")]


class AlignConfig(TrainerConfig):
    """Noise-prediction fine-tuning on images with long captions.

    Attributes:
        lora: the LoRA to train, or null to train all weights of the denoiser.
        train_adapter: whether to train the encoder's adapter too, if it has one.
        caption_dropout: fraction of captions replaced by the empty prompt, as classifier-free guidance requires.
        timesteps: sampling density of the training timesteps: ``"uniform"``, or ``"logit-normal"``, which concentrates
            on intermediate noise levels (arXiv 2403.03206, section 3.1). null is logit-normal for flows and uniform
            otherwise.
    """

    name: Literal["align"] = "align"
    lora: LoraConfig | None = LoraConfig()
    train_adapter: bool = True
    caption_dropout: float = Field(0.1, ge=0, le=1)
    timesteps: Literal["uniform", "logit-normal"] | None = None

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        return _image_problems(run, "'align'")

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.align import AlignTrainer

        self._reject_rewards(rewards)
        return AlignTrainer.from_config(self, backbone, encoder)


class LCMConfig(TrainerConfig):
    """Consistency distillation for sampling in a few steps without guidance (LCM, arXiv 2310.04378; LCM-LoRA,
    arXiv 2311.05556). The teacher is the ``init_from`` model; teacher and encoder are frozen.

    Attributes:
        lora: the LoRA to train, or null to train all weights of the denoiser.
        num_ddim_timesteps: number of DDIM steps from noise to image; must divide the model's timesteps. The teacher
            takes one of these steps: 50 of 1000 timesteps skip 20.
        start_timesteps: timesteps that the teacher starts from: ``"all"`` from half a skip on, as in the code of
            LongAlign's authors, or only those of the ``"ddim"`` steps, as in the paper.
        w_min: minimum guidance w of the teacher. Its scale is 1 + w (6.5 is a scale of 7.5), with w sampled per image.
        w_max: maximum guidance w of the teacher.
        huber_c: c of the pseudo-Huber loss; null is the squared error (l2).
        ema_decay: decay of the moving average of the student that computes the target, as in the LCM paper. null uses
            the student itself, as LCM-LoRA does. Independent of ``loop.ema``, which averages the saved weights.
        timestep_scaling_factor: factor of the timestep in the boundary condition; samplers use 10.
    """

    name: Literal["lcm"] = "lcm"
    lora: LoraConfig | None = LoraConfig()
    num_ddim_timesteps: int = Field(50, ge=1)
    start_timesteps: Literal["all", "ddim"] = "all"
    w_min: float = Field(6.5, ge=0)
    w_max: float = Field(6.5, ge=0)
    huber_c: float | None = Field(0.001, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    timestep_scaling_factor: float = Field(10.0, gt=0)

    @model_validator(mode="after")
    def _check_guidance_range(self) -> LCMConfig:
        if self.w_min > self.w_max:
            raise ValueError(f"expected w_min to be at most w_max, got {self.w_min} and {self.w_max}")
        return self

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        return _image_problems(run, "'lcm'")

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.lcm import LCMTrainer

        self._reject_rewards(rewards)
        return LCMTrainer.from_config(self, backbone, encoder)


class RewardConfig(TrainerConfig):
    """Reward fine-tuning by the gradient of rewards through sampling (LongAlign, section 4; DRTune, arXiv 2405.00760).

    Attributes:
        lora: the LoRA to train, or null to train all weights of the denoiser.
        train_adapter: whether to train the encoder's adapter too, if it has one; the paper freezes it.
        solver: ``"ddim"``, or ``"lcm"`` for a consistency-distilled model.
        num_steps: number of sampling steps.
        guidance: classifier-free guidance scale; 1 disables guidance. Both branches carry gradient.
        gradient_steps: which sampling steps carry gradient, and whether the gradient flows through their inputs.
        dropout_steps: whether the LoRA's dropout is active at ``"all"`` steps, or only at the ``"chosen"`` steps, those
            with gradient.
        resolution: width and height of the samples in pixels; null is the backbone's default.
        denoise_batch: images per rollout, or null for all. Smaller values save memory.
        decode_batch: images decoded at a time, or null for all. Smaller values save memory, but images are then decoded
            twice.
        replay_batch: maximum number of gradient steps that are recomputed in one call. Values above 1 require a
            denoiser and LoRA without dropout, and ``gradient_steps`` with constant inputs.
        regularizer: limits the drift from the reference model. ``"kl"`` is the squared difference of the two models'
            predictions at the gradient steps, which is the divergence of their sampling distributions up to a factor
            per step. ``"pretraining"`` is the noise-prediction loss on the data's images.
        regularizer_weight: factor of the regularizer.
    """

    uses_rewards: ClassVar[bool] = True

    name: Literal["reward"] = "reward"
    lora: LoraConfig | None = LoraConfig()
    train_adapter: bool = False
    solver: Literal["ddim", "lcm"] = "ddim"
    num_steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=1)
    gradient_steps: Part("gradient_steps") = "grouped-random"  # type: ignore[valid-type]
    dropout_steps: Literal["all", "chosen"] = "all"
    resolution: int | None = Field(None, ge=1)
    denoise_batch: int | None = Field(None, ge=1)
    decode_batch: int | None = Field(None, ge=1)
    replay_batch: int = Field(1, ge=1)
    regularizer: Literal["none", "kl", "pretraining"] = "none"
    regularizer_weight: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check_compatible(self) -> RewardConfig:
        if isinstance(self.gradient_steps, GradientStepsConfig):
            self.gradient_steps.check_steps(self.num_steps)
            if self.replay_batch > 1 and not self.gradient_steps.detaches():
                raise ValueError(
                    f"replay_batch is {self.replay_batch}, but with '{self.gradient_steps.name}' the gradient flows "
                    "through the denoiser's inputs, so gradient steps must be recomputed one at a time; set "
                    "replay_batch to 1 or choose gradient_steps with constant inputs"
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
                "the regularizer 'kl' compares with the reference model, which would use the adapter while it is "
                "trained; set train_adapter to false or choose 'pretraining'"
            )
        if self.regularizer != "none" and self.regularizer_weight is None:
            raise ValueError(f"the regularizer '{self.regularizer}' needs a regularizer_weight")
        return self

    @property
    def needs_images(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.regularizer == "pretraining"

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        problems = [] if run.rewards else [("rewards", f"'{self.name}' needs at least one reward")]
        problems += [
            (f"rewards.{i}", f"'{reward.name}' has no gradient in its images, which '{self.name}' requires")
            for i, reward in enumerate(run.rewards)
            if not getattr(reward, "differentiable", True)
        ]
        return problems + (
            _image_problems(run, "the regularizer 'pretraining'") if self.regularizer == "pretraining" else []
        )

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.reward import RewardTrainer

        gradient_steps = REGISTRIES["gradient_steps"].construct(self.gradient_steps, runtime)
        return RewardTrainer.from_config(self, backbone, encoder, rewards, gradient_steps)


class LCMRewardConfig(RewardConfig):
    """Reward fine-tuning of a consistency-distilled model (LongAlign's LCM variant). It samples four steps without
    guidance, at timesteps 999, 749, 499 and 249 of 1000, with fresh noise between them. All steps carry gradient.
    Otherwise as `reward`. ``init_from`` is a model trained by `lcm`.

    Attributes:
        solver: ``"lcm"``; use `reward` for other models.
        guidance: classifier-free guidance scale; 1 disables guidance, which is distilled into the weights.
    """

    name: Literal["lcm-reward"] = "lcm-reward"  # pyright: ignore[reportIncompatibleVariableOverride]
    solver: Literal["lcm"] = "lcm"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_steps: int = Field(4, ge=1)
    guidance: float = Field(1.0, ge=1)
    gradient_steps: Part("gradient_steps") = "all"  # type: ignore[valid-type]


class DenscoreTrainerConfig(TrainerConfig):
    """Trains the run's reward, a CLIP, as a preference model of long texts on pairs of images (Denscore, LongAlign,
    section 3.2). The run has no backbone and no encoder. Texts are encoded as the reward encodes them: segment by
    segment, or as a whole, which trains a PickScore. A checkpoint's folder ``reward/`` is a transformers ``CLIPModel``
    for the rewards `denscore`, `pickscore` and `clip`.

    Attributes:
        train: trainable parameters: ``"all"`` weights, the ``"text"`` or ``"vision"`` tower with its projection, or
            only the two ``"projections"``. The temperature is always trained.
        preference_weight: factor of the KL divergence from the annotated preference of a pair to the softmax of the two
            scores (PickScore, arXiv 2305.01569, section 3). A text's score is the mean over its segments. 0 disables
            the loss.
        contrastive_weight: factor of a contrastive loss over segments. Each segment must retrieve the image it
            describes among all images of the batch. The texts are the images' captions. Without captions they are the
            prompts, whose targets are both images of the pair, weighted by preference. 0 disables the loss.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    uses_rewards: ClassVar[bool] = True
    trains_rewards: ClassVar[bool] = True
    compares_pairs: ClassVar[bool] = True

    name: Literal["denscore"] = "denscore"
    train: Literal["all", "text", "vision", "projections"] = "all"
    preference_weight: float = Field(1.0, ge=0)
    contrastive_weight: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _check_any_loss(self) -> DenscoreTrainerConfig:
        if not self.preference_weight and not self.contrastive_weight:
            raise ValueError("preference_weight and contrastive_weight are both 0, so there is no loss; increase one")
        return self

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        problems = []
        if len(run.rewards) != 1 or not isinstance(run.rewards[0], ClipLikeConfig):
            got = ", ".join(f"'{reward.name}'" for reward in run.rewards) or "none"
            problems.append(("rewards", f"'denscore' trains one reward: 'denscore', 'pickscore' or 'clip'; got {got}"))
        unused = {
            "validation": "'denscore' generates no images; remove this key",
            "init_from": "'denscore' starts from its reward; set rewards.0.checkpoint to the folder instead",
        }
        return problems + [(key, message) for key, message in unused.items() if getattr(run, key) is not None]

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.denscore import DenscoreTrainer

        if len(rewards) != 1:
            raise ValueError(f"'denscore' trains one reward, got {len(rewards)}")
        settings = {key: getattr(self, key) for key in type(self).model_fields if key != "name"}
        return DenscoreTrainer(rewards[0], runtime, **settings)
