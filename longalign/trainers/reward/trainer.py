"""Reward fine-tuning with the exact gradient through sampling and constant memory (LongAlign, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longalign import registry
from longalign.backbones.base import Backbone
from longalign.encoders.base import Conditioning, Encoder
from longalign.functional.diffusion import add_noise, check_guidance_interval, guided_steps
from longalign.functional.graph_budget import GraphBudget
from longalign.functional.rollout_gradient import Predict, RecordedStep, replay, replay_backward, rollout
from longalign.functional.solvers import Solver, ddim, dpmpp_2m, lcm, sampling_timesteps
from longalign.gradient_steps.base import GradientSteps, GradientStepSelector
from longalign.rewards.base import Scores
from longalign.runtime import Runtime
from longalign.trainers.base import Backward
from longalign.trainers.diffusion import (
    DiffusionTrainer,
    batch_latents,
    evaluating,
    noise_loss,
    train_denoiser,
)
from longalign.trainers.prediction import make_predictions
from longalign.trainers.reward.config import RewardTrainerConfig
from longalign.trainers.rewards import RewardList


@dataclass(frozen=True)
class Rollout:
    """Samples of some prompts of a batch, and the denoiser calls on the way that receive gradient.

    It also stands for a copy of these samples that is noised again and denoised in one step; see
    `longalign.gradient_steps.base.GradientSteps.copies`.

    Attributes:
        rows: slice of the batch's prompts, with b prompts.
        solver: the sampling steps that led to ``final``.
        final: ``(b, c, h, w)`` latents to decode.
        recorded: the denoiser calls that receive gradient.
    """

    rows: slice
    solver: Solver
    final: Tensor
    recorded: list[RecordedStep]


class RewardTrainer(DiffusionTrainer):
    """Maximizes rewards of images sampled from the data's prompts.

    Each training step samples images without gradient and differentiates the loss ``0.5 (1 - mean score)`` with respect
    to the final latents. Only the selected denoiser calls are recomputed with gradient; see
    `longalign.functional.rollout_gradient`. Several rewards are added with equal weight; use the reward `sum` for other
    weights.

    Args:
        backbone: backbone whose trainable parameters are already set.
        encoder: encodes the prompts.
        rewards: rewards, or functions ``(images (b, 3, h, w), b prompts) -> scores (b,)``.
        gradient_steps: selects the sampling steps that receive gradient, here called gradient steps.
        solver: ``"ddim"``, ``"dpm++"`` or ``"lcm"``; see `longalign.functional.solvers`.
        num_steps: number of sampling steps.
        guidance: classifier-free guidance scale; 1 disables guidance.
        guidance_interval: guidance only in steps with a ratio of noise to signal above the first and up to the second
            number; None for all steps. See `longalign.functional.diffusion.guided_steps`.
        train_adapter: whether to train the encoder's adapter, if it has one.
        dropout_steps: sampling steps at which the denoiser's dropout is active: ``"all"``, or ``"gradient"`` for the
            gradient steps only.
        sizes: ``(height, width)`` of the samples in pixels; each training step chooses one at random. None is the
            backbone's native resolution.
        denoise_batch: number of images that are sampled together, or None for the whole batch.
        decode_batch: number of images that are decoded together, or None for the whole batch.
        replay_batch: maximum number of gradient steps recomputed in one call of the denoiser.
        replay: ``"recompute"`` recomputes the denoiser calls with gradient, ``"keep"`` keeps their autograd graphs. A
            number keeps graphs of at most so many GiB, and recomputes all other calls.
        regularizer: loss that limits the drift from the reference model: ``"none"``, ``"kl"`` or ``"pretraining"``; see
            `RewardTrainerConfig`.
        regularizer_weight: factor of this loss; None for ``"none"``.

    Raises:
        ValueError: if there are no rewards, or no sampling step is in ``guidance_interval``.
    """

    multiple_backward = True

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        rewards: Sequence[Any],
        gradient_steps: GradientStepSelector,
        *,
        solver: str,
        num_steps: int,
        guidance: float,
        guidance_interval: tuple[float, float] | None,
        train_adapter: bool,
        dropout_steps: Literal["all", "gradient"],
        sizes: Sequence[tuple[int, int]] | None,
        denoise_batch: int | None,
        decode_batch: int | None,
        replay_batch: int,
        replay: Literal["recompute", "keep"] | float,
        regularizer: Literal["none", "kl", "pretraining"],
        regularizer_weight: float | None,
    ):
        super().__init__(backbone, encoder, train_adapter)
        self.rewards = RewardList(rewards)
        self.gradient_steps = gradient_steps
        self.guidance, self.guidance_interval = guidance, guidance_interval
        self._make_solver = {"ddim": ddim, "dpm++": dpmpp_2m, "lcm": lcm}[solver]
        self._timesteps = partial(sampling_timesteps, solver, num_steps=num_steps)
        self.shapes = [backbone.latent_shape(*size) for size in sizes or [(None, None)]]
        for shape in reversed(self.shapes):
            self.use_shape(shape)
            if guidance_interval is not None:
                check_guidance_interval(self.levels, self.solver.timesteps, guidance_interval)
        self.dropout_steps = dropout_steps
        self.denoise_batch, self.decode_batch, self.replay_batch = denoise_batch, decode_batch, replay_batch
        self.replay = replay
        self.regularizer, self.regularizer_weight = regularizer, regularizer_weight or 0.0
        self.needs_images = regularizer == "pretraining"

    @classmethod
    def from_config(
        cls,
        config: RewardTrainerConfig,
        runtime: Runtime,
        *,
        backbone: Backbone,
        encoder: Encoder,
        rewards: Sequence[Any],
    ) -> RewardTrainer:
        """Adds a new LoRA to the backbone, or makes all of the denoiser's weights trainable, and builds the trainer."""
        if config.regularizer == "kl" and config.lora is None:
            backbone.keep_reference_model()
        train_denoiser(backbone, config.lora, "reward")
        return cls(
            backbone,
            encoder,
            rewards,
            registry.gradient_steps.construct(config.gradient_steps, runtime),
            solver=config.solver,
            num_steps=config.num_steps,
            guidance=config.guidance,
            guidance_interval=config.guidance_interval,
            train_adapter=config.train_adapter,
            dropout_steps=config.dropout_steps,
            sizes=config.sizes or None,
            denoise_batch=config.denoise_batch,
            decode_batch=config.decode_batch,
            replay_batch=config.replay_batch,
            replay=config.replay,
            regularizer=config.regularizer,
            regularizer_weight=config.regularizer_weight,
        )

    def use_shape(self, shape: tuple[int, int, int]) -> None:
        """Sets the latent shape ``(c, h, w)`` of the next samples, and the noise levels and solver for this shape."""
        self.shape, self.levels = shape, self.backbone.levels_at(shape)
        self.solve: Callable[[Sequence[int]], Solver] = partial(
            self._make_solver, self.levels, prediction=self.backbone.prediction
        )
        self.solver = self.solve(self._timesteps(self.levels))

    def step(self, batch: Mapping[str, Any], backward: Backward) -> dict[str, Tensor]:
        prompts = batch["prompt"]
        if len(self.shapes) > 1:
            self.use_shape(self.shapes[int(torch.randint(len(self.shapes), ()))])
        real = None
        if self.regularizer == "pretraining":
            real = batch_latents(self.backbone, batch, "the regularizer 'pretraining'")

        # Each replayed call has its own graph, so the gradient of the conditioning is accumulated in leaves.
        leaves: list[tuple[Tensor, Tensor]] = []
        conditioning = self.encode_with_uncond(prompts).map(partial(_make_leaf, leaves))
        noise, selected = self.noise(len(prompts)), self.gradient_steps.select(len(self.solver))
        chunks = _chunks(len(prompts), self.denoise_batch)
        keep = self.kept_graphs()
        with self.backbone.merged_lora():
            rollouts = [out for rows in chunks for out in self.sample(selected, noise[rows], conditioning, rows, keep)]

        latents = torch.cat([sampled.final for sampled in rollouts]).requires_grad_()
        with torch.enable_grad():
            losses = self.reward_loss(self.score(latents, [p for sampled in rollouts for p in prompts[sampled.rows]]))
            gradient = self.latent_gradient(losses["reward_loss"], latents)

        kl_loss = latents.new_zeros(())
        num_predictions = sum(len(sampled.final) * len(sampled.recorded) for sampled in rollouts)
        for sampled, grad in zip(rollouts, gradient.split([len(sampled.final) for sampled in rollouts]), strict=True):
            predict = self.predictions(conditioning, sampled.rows, sampled.solver)
            replayed = replay_backward(
                predict, sampled.solver, sampled.recorded, grad, selected.detach, self.replay_batch
            )
            for recorded, outputs, scalar in replayed:
                if self.regularizer == "kl":
                    # The regularizer's latents are constants, even if the reward's gradient flows through them.
                    outputs = outputs if selected.detach else replay(predict, recorded)
                    weight = self.regularizer_weight * len(outputs) / num_predictions
                    kl_term = weight * self.reference_mse(outputs, recorded, conditioning, sampled)
                    scalar, kl_loss = scalar + kl_term, kl_loss + kl_term.detach()
                backward(scalar)
        # Not through `backward`, which may scale the loss: the accumulated gradient is already scaled.
        reached = [(tensor, leaf.grad) for tensor, leaf in leaves if leaf.grad is not None]
        if reached:
            torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])

        if self.regularizer == "kl":
            losses["kl_loss"] = kl_loss
        if real is not None:
            loss = self.regularizer_weight * noise_loss(self.backbone, real, self.encode(prompts))
            backward(loss)
            losses["pretraining_loss"] = loss
        return {key: value.detach() for key, value in losses.items()}

    def sample(
        self,
        selected: GradientSteps,
        noise: Tensor,
        conditioning: Conditioning,
        rows: slice,
        keep: bool | GraphBudget = False,
    ) -> Iterator[Rollout]:
        """Samples some prompts of a batch without gradient.

        Args:
            selected: the gradient steps.
            noise: ``(b, c, h, w)`` initial noise.
            conditioning: output of `encode_with_uncond` for all prompts of the batch.
            rows: slice of the batch's prompts, with b prompts.
            keep: which calls keep their autograd graphs; see `kept_graphs`.

        Yields:
            The `Rollout` of the prompts, then ``selected.copies`` further ones, each of a copy of the samples that is
            noised again and denoised in one step.
        """
        solver = self.solve(self.solver.timesteps[: selected.length])
        predict = self.predictions(conditioning, rows, solver)
        without_dropout = None
        if self.dropout_steps == "gradient":
            without_dropout = [self.in_eval_mode(step) for step in self.predictions(conditioning, rows, solver)]
        run = partial(rollout, keep=keep, detach=selected.detach)
        final, recorded = run(predict, noise, solver, selected.steps, without_dropout)
        yield Rollout(rows, solver, final, recorded)
        last = self.solve(solver.timesteps[-1:])
        for _ in range(selected.copies):
            noisy = add_noise(self.levels, final, torch.randn_like(final), torch.tensor(last.timesteps))
            yield Rollout(rows, last, *run(predict[-1], noisy, last, [0]))

    def kept_graphs(self) -> bool | GraphBudget:
        """Returns which denoiser calls with gradient keep their autograd graphs in one training step.

        True: all calls. False: none. A `GraphBudget`: calls until their graphs fill this memory. It is the argument
        ``keep`` of `longalign.functional.rollout_gradient.rollout`.
        """
        if isinstance(self.replay, str):
            return self.replay == "keep"
        return GraphBudget(self.replay * 2**30, self.backbone.parameters())

    def noise(self, count: int) -> Tensor:
        """Samples initial noise ``(count, c, h, w)``."""
        return torch.randn((count, *self.shape), device=self.backbone.device)

    def encode_with_uncond(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes b prompts and, if guidance is enabled, the empty prompt, in one call with equal padding.

        Returns:
            Conditioning with a row for each of the b prompts and, if guidance is enabled, a last row for the empty
            prompt.
        """
        return self.encode([*prompts, ""] if self.guidance != 1 else list(prompts))

    def predictions(
        self, conditioning: Conditioning, rows: slice, solver: Solver, reference: bool = False
    ) -> list[Predict]:
        """Returns the prediction function of each sampling step; see `longalign.trainers.prediction.make_predictions`.

        Args:
            conditioning: output of `encode_with_uncond` for all prompts of the batch.
            rows: slice of the batch's prompts, for which the functions predict.
            solver: the sampling steps.
            reference: whether the reference model predicts, instead of the trained one.
        """
        guided = guided_steps(self.levels, solver.timesteps, self.guidance_interval)
        if self.guidance == 1:
            guided = [False] * len(solver)
        return make_predictions(self.backbone, conditioning, rows, guided, self.guidance, reference)

    def reference_mse(
        self, outputs: Tensor, recorded: Sequence[RecordedStep], conditioning: Conditioning, sampled: Rollout
    ) -> Tensor:
        """Returns the mean squared difference ``()`` between predictions of the trained and the reference model.

        Up to a factor per step, this is the KL divergence of the sampling distributions of the two models.

        Args:
            outputs: ``(r * b, c, h, w)`` predictions of the trained model at r recorded steps, ordered by step.
            recorded: the r recorded steps, with latents and timesteps.
            conditioning: output of `encode_with_uncond` for all prompts of the batch.
            sampled: the rollout to which the steps belong.
        """
        predict = self.predictions(conditioning, sampled.rows, sampled.solver, reference=True)[recorded[0].index]
        latents = torch.cat([step.latents for step in recorded])
        reference = predict(latents, torch.cat([step.timesteps for step in recorded]))
        return (outputs - reference).square().mean()

    def in_eval_mode(self, predict: Predict) -> Predict:
        """Wraps a prediction function so that it runs in eval mode, i.e. without dropout."""

        def predict_in_eval_mode(latents: Tensor, timesteps: Tensor) -> Tensor:
            with evaluating(self.backbone.denoiser):
                return predict(latents, timesteps)

        return predict_in_eval_mode

    def score(self, latents: Tensor, prompts: Sequence[str]) -> Scores:
        """Decodes final latents ``(b, c, h, w)`` and returns scores; see `RewardList.score_components`."""
        chunks = list(_chunks(len(latents), self.decode_batch))
        if len(chunks) == 1:
            images = self.backbone.decode(latents)
        else:
            decoded = [checkpoint(self.backbone.decode, latents[rows], use_reentrant=False) for rows in chunks]
            images = torch.cat([d for d in decoded if d is not None])
        return self.rewards.score_components(images, prompts)

    def latent_gradient(self, loss: Tensor, latents: Tensor) -> Tensor:
        """Returns the gradient ``(b, c, h, w)`` of a loss ``()`` with respect to the final latents ``(b, c, h, w)``.

        If a parameter is float16, the loss is scaled during this computation: float16 would round the gradient of
        single pixels to zero. The scale is reduced until the gradient is finite (arXiv 1710.03740, section 3.2).
        """
        half = any(parameter.dtype == torch.float16 for parameter in self.parameters())
        scale = 2.0**16 if half else 1.0
        while True:
            (gradient,) = torch.autograd.grad(scale * loss, latents, retain_graph=half)
            if scale == 1 or gradient.isfinite().all():
                return gradient / scale
            scale /= 4

    def reward_loss(self, scores: Scores) -> dict[str, Tensor]:
        """Returns the loss and metrics by name, each a tensor ``()``.

        ``reward`` is the mean score of the images, ``reward_loss`` is ``0.5 (1 - reward)``, and the other names are
        those of ``scores.parts``, with their means.
        """
        mean = scores.total.mean()
        parts = {key: value.float().mean() for key, value in scores.parts.items()}
        return {"reward_loss": 0.5 * (1 - mean), "reward": mean, **parts}


def _chunks(count: int, size: int | None) -> Iterator[slice]:
    size = size or count
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _make_leaf(leaves: list[tuple[Tensor, Tensor]], tensor: Tensor) -> Tensor:
    """Returns a leaf in place of a tensor that requires gradient, and adds both to ``leaves``."""
    if not tensor.requires_grad:
        return tensor
    leaves.append((tensor, tensor.detach().requires_grad_()))
    return leaves[-1][1]
