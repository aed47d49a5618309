"""Configs of the built-in trainers and of the ways to choose gradient steps; no torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from longalign.backbones.configs import LoraConfig
from longalign.registry import Part, PartConfig
from longalign.runtime import Runtime


class ScheduleConfig(PartConfig):
    """Base of the ways to choose the sampling steps that carry gradient."""

    def check_steps(self, num_steps: int) -> None:
        """Raises ValueError if there is no choice among ``num_steps`` sampling steps."""


class GroupedRandomConfig(ScheduleConfig):
    """One step in each of equal groups, at the same random offset (LongAlign, section 4): of 50 steps in 5 groups
    r, 10 + r, 20 + r, 30 + r and 40 + r with r in 0..9.

    Attributes:
        groups: number of groups, which is the number of steps with gradient.
    """

    name: Literal["grouped-random"] = "grouped-random"
    groups: int = Field(5, ge=1)

    def check_steps(self, num_steps: int) -> None:
        if num_steps % self.groups:
            raise ValueError(f"{num_steps} sampling steps cannot be divided into {self.groups} equal groups")

    def build(self, runtime: Runtime) -> Any:
        from longalign.trainers.schedules import GroupedRandom

        return GroupedRandom(self.groups)


class LastConfig(ScheduleConfig):
    """The last steps (DRaFT-K, arXiv 2309.17400).

    Attributes:
        k: how many.
    """

    name: Literal["last"] = "last"
    k: int = Field(1, ge=1)

    def check_steps(self, num_steps: int) -> None:
        if self.k > num_steps:
            raise ValueError(f"there are {num_steps} sampling steps, fewer than the last {self.k}")

    def build(self, runtime: Runtime) -> Any:
        from longalign.trainers.schedules import Last

        return Last(self.k)


class AllConfig(ScheduleConfig):
    """Every step."""

    name: Literal["all"] = "all"

    def build(self, runtime: Runtime) -> Any:
        from longalign.trainers.schedules import All

        return All()


class TrainerConfig(PartConfig):
    """Base of trainers' configs: a trainer is built from ready parts, not from their configs."""

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        """Makes the trainer and sets what is trained in its parts.

        Args:
            runtime: where the parts live.
            backbone: a `longalign.backbones.base.Backbone`.
            encoder: a `longalign.encoders.base.Encoder`.
            rewards: rewards, or plain functions ``(images, prompts) -> scores``.
        """
        raise NotImplementedError


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
        faults = [("rewards", "'align' uses no rewards; expected none, or another trainer")] if run.rewards else []
        return faults + _without_images(run, "'align'")

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.align import AlignTrainer

        if rewards:
            raise ValueError(f"'align' uses no rewards, got {len(rewards)}; expected none, or another trainer")
        return AlignTrainer.from_config(self, backbone, encoder)


class RewardConfig(TrainerConfig):
    """Reward fine-tuning by the gradient of rewards through sampling (LongAlign, section 4; DRTune, arXiv 2405.00760).

    Attributes:
        lora: the LoRA that is trained, or null to train all weights of the denoiser.
        train_adapter: whether the encoder's adapter, if it has one, is trained too; the paper freezes it.
        solver: ``"ddim"``, or ``"lcm"`` for a consistency-distilled model.
        num_steps: sampling steps.
        guidance: scale of classifier-free guidance, whose both branches carry gradient; 1 is none.
        schedule: which steps carry gradient.
        dropout_steps: whether the LoRA's dropout is active at ``"all"`` steps, or at the ``"chosen"`` ones only.
        resolution: width and height of the samples in pixels; the backbone's own if null.
        denoise_batch: images in one rollout, or null for all; less needs less memory.
        decode_batch: images decoded at a time, or null for all. Less needs less memory and decodes twice.
        replay_batch: chosen steps that are repeated in one call. More than one asks for a LoRA without dropout.
        regularizer: against drift from the start model: ``"kl"`` is the squared difference of the two models' answers
            at the chosen steps, the divergence of their sampling distributions up to a factor per step;
            ``"pretraining"`` is the noise-prediction loss on the data's images.
        regularizer_weight: its factor.
    """

    name: Literal["reward"] = "reward"
    lora: LoraConfig | None = LoraConfig()
    train_adapter: bool = False
    solver: Literal["ddim", "lcm"] = "ddim"
    num_steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=1)
    schedule: Part("schedules") = "grouped-random"  # type: ignore[valid-type]
    dropout_steps: Literal["all", "chosen"] = "all"
    resolution: int | None = Field(None, ge=1)
    denoise_batch: int | None = Field(None, ge=1)
    decode_batch: int | None = Field(None, ge=1)
    replay_batch: int = Field(1, ge=1)
    regularizer: Literal["none", "kl", "pretraining"] = "none"
    regularizer_weight: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _agree(self) -> RewardConfig:
        check = getattr(self.schedule, "check_steps", None)
        if check is not None:
            check(self.num_steps)
        if self.replay_batch > 1 and self.lora is not None and self.lora.dropout:
            raise ValueError(
                "with a LoRA that has dropout each chosen step must be repeated by itself, with its own random "
                "numbers; set replay_batch to 1 or lora.dropout to 0"
            )
        if self.regularizer == "none" and self.regularizer_weight is not None:
            raise ValueError("regularizer_weight has no effect without a regularizer; choose kl or pretraining")
        if self.regularizer != "none" and self.regularizer_weight is None:
            raise ValueError(f"the regularizer '{self.regularizer}' needs a regularizer_weight")
        return self

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        faults = [] if run.rewards else [("rewards", "'reward' needs at least one reward")]
        return faults + (
            _without_images(run, "the regularizer 'pretraining'") if self.regularizer == "pretraining" else []
        )

    def build(self, runtime: Runtime, *, backbone: Any = None, encoder: Any = None, rewards: Any = ()) -> Any:
        from longalign.trainers.reward import RewardTrainer

        schedule = self.schedule.build(runtime)
        return RewardTrainer.from_config(self, backbone, encoder, rewards, schedule)
