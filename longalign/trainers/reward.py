"""Reward fine-tuning with the exact gradient through sampling at a constant cost in memory (LongAlign, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longalign.backbones.base import Backbone
from longalign.diffusion import Solver, add_noise, ddim, lcm, trailing_timesteps
from longalign.encoders.base import Conditioning, Encoder
from longalign.gradient_steps.base import GradientSteps, GradientStepSelector
from longalign.rewards.base import Reward, Scores, as_reward
from longalign.rewards.guard import guarded
from longalign.rollout import Predict, RecordedStep, replay, replay_backward, rollout
from longalign.trainers.base import (
    Backward,
    DiffusionTrainer,
    evaluating,
    guided_prediction,
    batch_latents,
    noise_loss,
    train_denoiser,
)
from longalign.trainers.configs import RewardConfig


@dataclass(frozen=True)
class Pass:
    """A rollout of some of the prompts, or one more prediction of their re-noised samples.

    Attributes:
        rows: which b of the prompts.
        solver: its steps.
        final: ``(b, c, h, w)`` latents to decode.
        visits: the calls that are to be repeated.
    """

    rows: slice
    solver: Solver
    final: Tensor
    recorded: list[RecordedStep]


class RewardTrainer(DiffusionTrainer):
    """Raises rewards of images sampled from the data's prompts.

    A step samples without gradient, differentiates ``0.5 (1 - mean score)`` at the final latents, and repeats only the
    chosen calls of the denoiser, each with its share of that gradient (see `longalign.rollout`). Several rewards are
    added; `sum` weighs them.

    Args:
        backbone: with what is trained of it already set.
        encoder: encodes the prompts.
        rewards: rewards, or functions ``(images, prompts) -> (b,)``.
        gradient_steps: chooses the steps that carry gradient, see `longalign.gradient_steps.base.GradientSteps`.
        solver: ``"ddim"`` or ``"lcm"``.
        num_steps: sampling steps.
        guidance: scale of classifier-free guidance; 1 is none.
        train_adapter: whether the encoder's adapter is trained.
        dropout_steps: ``"all"`` or ``"chosen"``: where the denoiser's dropout is active.
        resolution: of the samples in pixels, or None for the backbone's own.
        denoise_batch: images in one rollout, or None for all.
        decode_batch: images decoded at a time, or None for all.
        replay_batch: chosen steps repeated in one call, at most.
        regularizer: ``"none"``, ``"kl"`` or ``"pretraining"``.
        regularizer_weight: its factor.
    """

    multiple_backward = True

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        rewards: Sequence[Any],
        gradient_steps: GradientStepSelector,
        *,
        solver: Literal["ddim", "lcm"] = "ddim",
        num_steps: int = 50,
        guidance: float = 7.5,
        train_adapter: bool = False,
        dropout_steps: Literal["all", "chosen"] = "all",
        resolution: int | None = None,
        denoise_batch: int | None = None,
        decode_batch: int | None = None,
        replay_batch: int = 1,
        regularizer: Literal["none", "kl", "pretraining"] = "none",
        regularizer_weight: float | None = None,
    ):
        super().__init__(backbone, encoder, train_adapter)
        if not rewards:
            raise ValueError("reward fine-tuning expects at least one reward, got none")
        self.rewards = nn.ModuleList([as_reward(reward).requires_grad_(False) for reward in rewards])
        self.gradient_steps = gradient_steps
        self.solve: Callable[[Sequence[int]], Solver] = partial(
            {"ddim": ddim, "lcm": lcm}[solver], backbone.noise_levels, prediction=backbone.prediction
        )
        self.solver = self.solve(trailing_timesteps(num_steps, len(backbone.noise_levels)))
        self.guidance = guidance
        self.dropout_steps = dropout_steps
        self.resolution = resolution
        self.denoise_batch, self.decode_batch, self.replay_batch = denoise_batch, decode_batch, replay_batch
        self.regularizer, self.regularizer_weight = regularizer, regularizer_weight or 0.0
        self.needs_images = regularizer == "pretraining"

    @classmethod
    def from_config(
        cls,
        config: RewardConfig,
        backbone: Backbone,
        encoder: Encoder,
        rewards: Sequence[Any],
        gradient_steps: GradientStepSelector,
    ) -> RewardTrainer:
        """Puts a new LoRA on the backbone, or makes all of it trainable, and takes the parts together."""
        if config.regularizer == "kl" and config.lora is None:
            backbone.keep_reference_model()
        train_denoiser(backbone, config.lora, "reward")
        settings = {
            k: getattr(config, k) for k in type(config).model_fields if k not in ("name", "lora", "gradient_steps")
        }
        return cls(backbone, encoder, rewards, gradient_steps, **settings)

    def train(self, mode: bool = True) -> RewardTrainer:
        """Rewards know of training mode; the networks inside them are frozen and stay in eval mode."""
        super().train(mode)
        for module in self.rewards.modules():
            module.training = mode and isinstance(module, Reward)
        return self

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss and metrics of fresh samples, without gradient, which `step` computes on its way."""
        prompts = batch["prompt"]
        with torch.no_grad():
            predict = self.predictor(self.backbone.predict, self.encode_with_uncond(prompts), slice(0, len(prompts)))
            latents, _ = rollout(predict, self.noise(len(prompts)), self.solver)
            return self.reward_loss(self.score(latents, prompts))

    def step(self, batch: Mapping[str, Any], backward: Backward) -> dict[str, Tensor]:
        prompts = batch["prompt"]
        real = None
        if self.regularizer == "pretraining":
            real = batch_latents(self.backbone, batch, "the regularizer 'pretraining'")

        # Each repeated call has its own graph, so the gradient of the conditioning is gathered at a leaf.
        encoded = self.encode_with_uncond(prompts)
        conditioning = replace(encoded, states=encoded.states.detach().requires_grad_(encoded.states.requires_grad))
        noise, choice = self.noise(len(prompts)), self.gradient_steps.select(len(self.solver))
        chunks = _chunks(len(prompts), self.denoise_batch)
        passes = [each for rows in chunks for each in self.sample(choice, noise[rows], conditioning, rows)]

        latents = torch.cat([each.final for each in passes]).requires_grad_()
        with torch.enable_grad():
            losses = self.reward_loss(self.score(latents, [p for each in passes for p in prompts[each.rows]]))
            gradient = self.latent_gradient(losses["reward_loss"], latents)

        drift = latents.new_zeros(())
        calls = sum(len(each.final) * len(each.recorded) for each in passes)
        for each, vector in zip(passes, gradient.split([len(each.final) for each in passes]), strict=True):
            predict = self.predictor(self.backbone.predict, conditioning, each.rows)
            repeated = replay_backward(predict, each.solver, each.recorded, vector, choice.detach, self.replay_batch)
            for recorded, outputs, pulled in repeated:
                if self.regularizer == "kl":
                    # It takes the latents as they are, also where the reward's gradient flows through them.
                    answers = outputs if choice.detach else replay(predict, recorded)
                    share = self.regularizer_weight * len(answers) / calls
                    away = share * self.drift(answers, recorded, conditioning, each.rows)
                    pulled, drift = pulled + away, drift + away.detach()
                backward(pulled)
        if conditioning.states.grad is not None:
            # Not by `backward`, which may scale: what was gathered is scaled already.
            encoded.states.backward(conditioning.states.grad)

        if self.regularizer == "kl":
            losses["kl_loss"] = drift
        if real is not None:
            loss = self.regularizer_weight * noise_loss(self.backbone, real, self.encode(prompts))
            backward(loss)
            losses["pretraining_loss"] = loss
        return {key: value.detach() for key, value in losses.items()}

    def sample(self, choice: GradientSteps, noise: Tensor, conditioning: Conditioning, rows: slice) -> Iterator[Pass]:
        """Samples some of the prompts from ``noise`` ``(b, c, h, w)`` without gradient; after them their copies."""
        predict = self.predictor(self.backbone.predict, conditioning, rows)
        solver = self.solve(self.solver.timesteps[: choice.length])
        final, recorded = rollout(predict, noise, solver, choice.steps, self.predict_no_dropout(predict))
        yield Pass(rows, solver, final, recorded)
        last = self.solve(solver.timesteps[-1:])
        for _ in range(choice.copies):
            noisy = add_noise(self.backbone.noise_levels, final, torch.randn_like(final), torch.tensor(last.timesteps))
            yield Pass(rows, last, *rollout(predict, noisy, last, [0]))

    def noise(self, count: int) -> Tensor:
        """Pure noise ``(count, c, h, w)`` to sample from."""
        shape = self.backbone.latent_shape(self.resolution, self.resolution)
        return torch.randn((count, *shape), device=self.backbone.device)

    def encode_with_uncond(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of the prompts, and after them that of the empty prompt if there is guidance: one call, so
        that both have the same length."""
        return self.encode([*prompts, ""] if self.guidance != 1 else list(prompts))

    def predictor(
        self, denoise: Callable[[Tensor, Tensor, Conditioning], Tensor], conditioning: Conditioning, rows: slice
    ) -> Predict:
        """The guided answer of ``denoise`` for some of the prompts.

        Args:
            denoise: `Backbone.predict` or `Backbone.predict_reference`.
            told: from `encode_with_uncond`.
            rows: which b of the prompts. The latents are those of one or more visits, ``(v * b, c, h, w)``.
        """
        prompts = torch.arange(rows.start, rows.stop, device=conditioning.states.device)

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            of = prompts.repeat(len(latents) // len(prompts))
            if self.guidance == 1:
                return denoise(latents, timesteps, conditioning[of])
            return guided_prediction(denoise, latents, timesteps, conditioning, of, self.guidance)

        return predict

    def drift(
        self, outputs: Tensor, recorded: Sequence[RecordedStep], conditioning: Conditioning, rows: slice
    ) -> Tensor:
        """Mean squared difference of ``outputs`` to the start model's answers at the same visits; a scalar."""
        start = self.predictor(self.backbone.predict_reference, conditioning, rows)
        before = start(torch.cat([v.latents for v in recorded]), torch.cat([v.timesteps for v in recorded]))
        return (outputs - before).square().mean()

    def predict_no_dropout(self, predict: Predict) -> Predict | None:
        """The denoiser for the steps that are not chosen, if it differs there."""
        if self.dropout_steps == "all":
            return None

        def predict_in_eval_mode(latents: Tensor, timesteps: Tensor) -> Tensor:
            with evaluating(self.backbone.denoiser):
                return predict(latents, timesteps)

        return predict_in_eval_mode

    def score(self, latents: Tensor, prompts: Sequence[str]) -> Scores:
        """The added scores of final latents ``(b, c, h, w)``, with all of their parts."""
        chunks = list(_chunks(len(latents), self.decode_batch))
        if len(chunks) == 1:
            images = self.backbone.decode(latents)
        else:
            decoded = [checkpoint(self.backbone.decode, latents[rows], use_reentrant=False) for rows in chunks]
            images = torch.cat([d for d in decoded if d is not None])
        scored = [guarded(reward, images, prompts) for reward in self.rewards if isinstance(reward, Reward)]
        if len(scored) == 1:
            return scored[0]
        parts = {}
        for i, scores in enumerate(scored):
            parts |= {f"{i}/{key}": value for key, value in {"reward": scores.total.detach(), **scores.parts}.items()}
        return Scores(torch.stack([scores.total for scores in scored]).sum(0), parts)

    def latent_gradient(self, loss: Tensor, latents: Tensor) -> Tensor:
        """The loss's gradient at the final latents.

        Where something is in float16, the gradient of a single pixel would be rounded to nothing. There the loss is
        scaled, as far as all stays finite (arXiv 1710.03740, section 3.2).
        """
        half = any(parameter.dtype == torch.float16 for parameter in self.parameters())
        scale = 2.0**16 if half else 1.0
        while True:
            (gradient,) = torch.autograd.grad(scale * loss, latents, retain_graph=half)
            if scale == 1 or gradient.isfinite().all():
                return gradient / scale
            scale /= 4

    def reward_loss(self, scores: Scores) -> dict[str, Tensor]:
        """The loss ``0.5 (1 - mean score)``, the mean score, and the mean of each of its parts."""
        mean = scores.total.mean()
        parts = {key: value.float().mean() for key, value in scores.parts.items()}
        return {"reward_loss": 0.5 * (1 - mean), "reward": mean, **parts}


def _chunks(count: int, size: int | None) -> Iterator[slice]:
    size = size or count
    return (slice(i, min(i + size, count)) for i in range(0, count, size))
