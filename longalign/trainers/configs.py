"""Configs of the built-in trainers; no torch here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.backbones.configs import LoraConfig
from longalign.gradient_steps.configs import GradientStepsConfig
from longalign.registry import REGISTRIES, Part, PartConfig
from longalign.rewards.configs import ClipLikeConfig
from longalign.runtime import Runtime


class TrainerConfig(PartConfig):
    """Base of trainers' configs: a trainer is built from ready parts, not from their configs.

    What it asks of a run, which is checked before anything is loaded: ``needs`` are the keys that must be there of
    ``backbone`` and ``encoder``, the other must be left out; ``uses_rewards`` says whether the run may have rewards,
    ``trains_rewards`` whether they are what is trained, ``compares_pairs`` whether the data must have two images of
    each prompt, ``needs_images`` whether it needs images at all.
    """

    needs: ClassVar[tuple[str, ...]] = ("backbone", "encoder")
    uses_rewards: ClassVar[bool] = False
    trains_rewards: ClassVar[bool] = False
    compares_pairs: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        """Makes the trainer and sets what is trained in its parts.

        Args:
            runtime: where the parts live.
            backbone: a `longalign.backbones.base.Backbone`.
            encoder: a `longalign.encoders.base.Encoder`.
            rewards: rewards, or plain functions ``(images, prompts) -> scores``.
        """
        raise NotImplementedError

    def _without(self, rewards: Any) -> None:
        """Raises ValueError if there are rewards."""
        if rewards:
            raise ValueError(f"'{self.name}' uses no rewards, got {len(rewards)}")


def _without_images(run: Any, what: str) -> list[tuple[str, str]]:
    if getattr(run.data, "has_images", True):
        return []
    return [("data", f"{what} needs images, and '{run.data.name}' has prompts only; choose data with images")]


class AlignConfig(TrainerConfig):
    """Noise-prediction fine-tuning on images with long captions.

    Attributes:
        lora: the LoRA that is trained, or null to train all weights of the denoiser.
        train_adapter: whether the encoder's adapter, if it has one, is trained too.
        caption_dropout: share of captions replaced by the empty prompt, which classifier-free guidance needs.
        timesteps: how those to train at are drawn: ``"uniform"``, or ``"logit-normal"``, more from the middle
            (arXiv 2403.03206, section 3.1); null is logit-normal for flows and uniform for others.
    """

    name: Literal["align"] = "align"
    lora: LoraConfig | None = LoraConfig()
    train_adapter: bool = True
    caption_dropout: float = Field(0.1, ge=0, le=1)
    timesteps: Literal["uniform", "logit-normal"] | None = None

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        return _without_images(run, "'align'")

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.align import AlignTrainer

        self._without(rewards)
        return AlignTrainer.from_config(self, backbone, encoder)


class LCMConfig(TrainerConfig):
    """Consistency distillation, so that a few steps without guidance draw an image (LCM, arXiv 2310.04378; LCM-LoRA,
    arXiv 2311.05556). The teacher is the model of ``init_from``; it and the encoder stay as they are.

    Attributes:
        lora: the LoRA that is trained, or null to train all weights of the denoiser.
        num_ddim_timesteps: DDIM steps from noise to image, a divisor of the model's timesteps. The teacher takes one of
            them: 50 of 1000 skip 20 timesteps.
        start_timesteps: where it starts: ``"all"`` timesteps from half a skip on, as the authors of LongAlign do, or
            those of the ``"ddim"`` steps alone, as the paper does.
        w_min: least guidance of the teacher, whose scale is 1 + w, drawn anew for each image: 6.5 is a scale of 7.5.
        w_max: largest guidance of the teacher.
        huber_c: c of the pseudo-Huber loss; null is the squared error (l2).
        ema_decay: of the moving average of the student that gives the target, as in the first paper; null takes the
            student itself, as LCM-LoRA does. It is not ``loop.ema``, which averages what is saved.
        timestep_scaling_factor: factor of the timestep in the boundary condition; samplers take 10.
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
    def _in_order(self) -> LCMConfig:
        if self.w_min > self.w_max:
            raise ValueError(f"expected w_min to be at most w_max, got {self.w_min} and {self.w_max}")
        return self

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        return _without_images(run, "'lcm'")

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.lcm import LCMTrainer

        self._without(rewards)
        return LCMTrainer.from_config(self, backbone, encoder)


class RewardConfig(TrainerConfig):
    """Reward fine-tuning by the gradient of rewards through sampling (LongAlign, section 4; DRTune, arXiv 2405.00760).

    Attributes:
        lora: the LoRA that is trained, or null to train all weights of the denoiser.
        train_adapter: whether the encoder's adapter, if it has one, is trained too; the paper freezes it.
        solver: ``"ddim"``, or ``"lcm"`` for a consistency-distilled model.
        num_steps: sampling steps.
        guidance: scale of classifier-free guidance, whose both branches carry gradient; 1 is none.
        gradient_steps: which steps carry gradient, and whether through their inputs.
        dropout_steps: whether the LoRA's dropout is active at ``"all"`` steps, or at the ``"chosen"`` ones only.
        resolution: width and height of the samples in pixels; the backbone's own if null.
        denoise_batch: images in one rollout, or null for all; less needs less memory.
        decode_batch: images decoded at a time, or null for all. Less needs less memory and decodes twice.
        replay_batch: chosen steps that are repeated in one call, at most. More than one asks for a denoiser and LoRA
            without dropout and a schedule with constant inputs.
        regularizer: against drift from the start model: ``"kl"`` is the squared difference of the two models' answers
            at the chosen steps, the divergence of their sampling distributions up to a factor per step;
            ``"pretraining"`` is the noise-prediction loss on the data's images.
        regularizer_weight: its factor.
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
    def _agree(self) -> RewardConfig:
        if isinstance(self.gradient_steps, GradientStepsConfig):
            self.gradient_steps.check_steps(self.num_steps)
            if self.replay_batch > 1 and not self.gradient_steps.detaches():
                raise ValueError(
                    f"with '{self.gradient_steps.name}' the gradient flows through the denoiser's inputs, so each "
                    "chosen step must be repeated after the one that follows it; set replay_batch to 1 or choose "
                    "gradient_steps with constant inputs"
                )
        if self.replay_batch > 1 and self.lora is not None and self.lora.dropout:
            raise ValueError(
                "with a LoRA that has dropout each chosen step must be repeated by itself, with its own random "
                "numbers; set replay_batch to 1 or lora.dropout to 0"
            )
        if self.regularizer == "none" and self.regularizer_weight is not None:
            raise ValueError("regularizer_weight has no effect without a regularizer; choose kl or pretraining")
        if self.regularizer == "kl" and self.train_adapter:
            raise ValueError(
                "the regularizer 'kl' compares with the start model, which would read texts by the adapter as it is "
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
            (f"rewards.{i}", f"'{reward.name}' has no gradient in its images, by which '{self.name}' trains")
            for i, reward in enumerate(run.rewards)
            if not getattr(reward, "differentiable", True)
        ]
        return problems + (
            _without_images(run, "the regularizer 'pretraining'") if self.regularizer == "pretraining" else []
        )

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.reward import RewardTrainer

        gradient_steps = REGISTRIES["gradient_steps"].construct(self.gradient_steps, runtime)
        return RewardTrainer.from_config(self, backbone, encoder, rewards, gradient_steps)


class LCMRewardConfig(RewardConfig):
    """Reward fine-tuning of a consistency-distilled model: four steps without guidance, at timesteps 999, 749, 499 and
    249 of 1000, with fresh noise between them, all of which carry gradient (LongAlign's LCM variant). As `reward`
    otherwise; ``init_from`` gives what `lcm` trained.

    Attributes:
        solver: ``"lcm"``; other models are for `reward`.
        guidance: scale of classifier-free guidance; 1 is none, since distillation has put it into the weights.
    """

    name: Literal["lcm-reward"] = "lcm-reward"  # pyright: ignore[reportIncompatibleVariableOverride]
    solver: Literal["lcm"] = "lcm"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_steps: int = Field(4, ge=1)
    guidance: float = Field(1.0, ge=1)
    gradient_steps: Part("gradient_steps") = "all"  # type: ignore[valid-type]


class DenscoreTrainerConfig(TrainerConfig):
    """Training of the run's reward, a CLIP, as a preference model of long texts (Denscore, LongAlign, section 3.2),
    from pairs of images. There is no backbone and no encoder. Texts are read as the reward reads them: segment by
    segment, or whole, which trains a PickScore. A checkpoint's folder ``reward/`` is a transformers ``CLIPModel`` that
    the rewards `denscore`, `pickscore` and `clip` load.

    Attributes:
        train: what is trained: ``"all"`` weights, the ``"text"`` or the ``"vision"`` tower with its projection, or the
            two ``"projections"`` alone; the temperature always.
        preference_weight: factor of the divergence from which image of a pair is preferred to the softmax of their
            scores (PickScore, arXiv 2305.01569, section 3), a text's score being the mean over its segments; 0 leaves
            it out.
        contrastive_weight: factor of a contrastive loss over segments: each finds the image that it tells of among all
            images of the batch. The texts are the images' captions; where the data has none, the prompts, which tell of
            both images, of each as far as it is preferred. 0 leaves it out.
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
    def _some_loss(self) -> DenscoreTrainerConfig:
        if not self.preference_weight and not self.contrastive_weight:
            raise ValueError("preference_weight and contrastive_weight are both 0, so there is no loss; raise one")
        return self

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        problems = []
        if len(run.rewards) != 1 or not isinstance(run.rewards[0], ClipLikeConfig):
            got = ", ".join(f"'{reward.name}'" for reward in run.rewards) or "none"
            problems.append(("rewards", f"'denscore' trains one reward: 'denscore', 'pickscore' or 'clip'; got {got}"))
        unused = {
            "validation": "'denscore' draws no images; leave it out",
            "init_from": "'denscore' starts from its reward: give the folder as rewards.0.checkpoint",
        }
        return problems + [(key, message) for key, message in unused.items() if getattr(run, key) is not None]

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.denscore import DenscoreTrainer

        if len(rewards) != 1:
            raise ValueError(f"'denscore' trains one reward, got {len(rewards)}")
        settings = {key: getattr(self, key) for key in type(self).model_fields if key != "name"}
        return DenscoreTrainer(rewards[0], runtime, **settings)
