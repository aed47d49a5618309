"""The trainer `grpo`: policy gradient over the steps of a stochastic sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from longalign.backbones import Backbone
from longalign.encoders import Conditioning, Encoder
from longalign.functional import ddim, rollout, sampling_timesteps
from longalign.runtime import Runtime
from longalign.sizes import parse_size
from longalign.trainers import DiffusionTrainer, RewardList, make_predictions, train_denoiser
from torch import Tensor

from longalign_grpo.config import GRPOConfig
from longalign_grpo.policy import clipped_objective, group_advantages, step_kl, step_log_prob
from longalign_grpo.trajectories import Trajectories


class GRPOTrainer(DiffusionTrainer):
    """Makes sampling steps more likely if they led to an image with an above-average reward for its prompt.

    The latent after a sampling step is normally distributed with mean ``a x + b o`` and a known standard deviation.
    Here ``o`` is the guided prediction at the latent ``x``; a and b are constants of the step. A training step samples
    ``group_size`` images per prompt without gradient. It then computes the prediction again with gradient, one sampling
    step at a time, so that memory does not depend on the number of steps. Dropout is inactive, because sampling and
    training need the same model.

    Args:
        backbone: backbone whose trainable parameters are already set.
        encoder: encodes the prompts; frozen.
        rewards: rewards, or functions ``(images (b, 3, h, w), b prompts) -> scores (b,)``. They need no gradient.
        num_steps: number of sampling steps.
        eta: scale of the noise added in each sampling step, from above 0 to 1; see `longalign.functional.ddim`.
        guidance: classifier-free guidance scale; 1 disables guidance.
        resolution: side of square samples in pixels, or ``"WIDTHxHEIGHT"``. None is the backbone's native resolution.
        group_size: number of images per prompt.
        train_steps: number of sampling steps to train, chosen at random; None for all but the last, which is
            deterministic.
        updates: number of optimizer steps for each batch of samples.
        clip_range: probability ratios are clipped to 1 plus or minus this value.
        advantage_clip: maximum absolute advantage of an image.
        kl_weight: factor of the KL divergence from the reference model; 0 disables it.
        denoise_batch: number of images per call of the denoiser or decoder, or None for all.

    Raises:
        ValueError: if there are no rewards.
    """

    multiple_backward = True
    needs_images = False

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        rewards: Sequence[Any],
        *,
        num_steps: int,
        eta: float,
        guidance: float,
        resolution: int | str | None,
        group_size: int,
        train_steps: int | None,
        updates: int,
        clip_range: float,
        advantage_clip: float,
        kl_weight: float,
        denoise_batch: int | None,
    ):
        super().__init__(backbone, encoder, train_adapter=False)
        self.rewards = RewardList(rewards)
        height, width = (None, None) if resolution is None else parse_size(resolution)
        self.shape = backbone.latent_shape(height, width)
        levels = backbone.levels_at(self.shape)
        self.solver = ddim(levels, sampling_timesteps("ddim", levels, num_steps), backbone.prediction, eta)
        self.guidance, self.group_size, self.train_steps, self.updates = guidance, group_size, train_steps, updates
        self.clip_range, self.advantage_clip, self.kl_weight = clip_range, advantage_clip, kl_weight
        self.denoise_batch = denoise_batch
        self.trajectories = Trajectories()

    @classmethod
    def from_config(
        cls, config: GRPOConfig, runtime: Runtime, *, backbone: Backbone, encoder: Encoder, rewards: Sequence[Any]
    ) -> GRPOTrainer:
        """Adds a new LoRA to the backbone, or makes all of the denoiser's weights trainable, and builds the trainer.

        Raises:
            ValueError: if ``config.updates`` is above 1 and there are several processes.
        """
        if config.updates > 1 and runtime.world_size > 1:
            raise ValueError(
                f"trainer.updates is {config.updates}, but a checkpoint stores the samples of one process, and there "
                f"are {runtime.world_size} processes; set trainer.updates to 1"
            )
        if config.kl_weight and config.lora is None:
            backbone.keep_reference_model()
        train_denoiser(backbone, config.lora, "grpo")
        settings = config.model_dump(exclude={"name", "lora"})
        return cls(backbone, encoder, rewards, **settings)

    def train(self, mode: bool = True) -> GRPOTrainer:
        """Sets training mode, except for the backbone, in which dropout stays inactive."""
        super().train(mode)
        self.backbone.eval()
        return self

    def step(self, batch: Mapping[str, Any], backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Samples images, unless stored samples are left, and calls ``backward`` for each trained sampling step.

        Samples stay stored for ``updates`` calls of this method.

        Args:
            batch: ``{"prompt": list[str]}``; not used if stored samples are left.
            backward: computes the gradient of a scalar.

        Returns:
            Tensors ``()``: ``policy_loss``; ``kl_loss`` if ``kl_weight`` is not 0; ``clip_fraction``, the fraction of
            probability ratios outside the clipping range. For new samples also the mean ``reward``, its named
            components, and ``group_std``, the standard deviation of the reward within a group, averaged over groups.
        """
        metrics = self.sample(batch["prompt"]) if self.trajectories.is_empty() else {}
        metrics |= self.update(backward)
        if int(self.trajectories.num_updates) == self.updates:
            self.trajectories.clear()
        return metrics

    @torch.no_grad()
    def sample(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Samples a group of images for each prompt, and stores their latents and advantages for `update`.

        Returns:
            Metrics of the new samples, tensors ``()`` by name; see `step`.
        """
        repeated = [prompt for prompt in prompts for _ in range(self.group_size)]
        conditioning, chunks = self.conditioning(prompts), self.chunks(len(repeated))
        noise = torch.randn((len(repeated), *self.shape), device=self.backbone.device)
        parts = []
        with self.backbone.merged_lora():
            for rows in chunks:
                predict = self.predictions(conditioning, rows)
                final, recorded = rollout(predict, noise[rows], self.solver, range(len(self.solver)))
                parts.append(torch.stack([*(step.latents for step in recorded), final]))
        latents = torch.cat(parts, dim=1)
        images = torch.cat([self.backbone.decode(latents[-1, rows]) for rows in chunks])
        scores = self.rewards.score_components(images, repeated)
        steps = torch.randperm(len(self.solver) - 1)[: self.train_steps].sort().values
        advantages = group_advantages(scores.total, self.group_size, self.advantage_clip)
        self.trajectories.store(prompts, latents, advantages, steps)
        group_std = scores.total.float().view(-1, self.group_size).std(1).mean()
        parts_of_reward = {key: value.float().mean() for key, value in scores.parts.items()}
        return {"reward": scores.total.float().mean(), **parts_of_reward, "group_std": group_std}

    def update(self, backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Calls ``backward`` on the loss of each trained sampling step of the stored samples.

        Returns:
            Losses and metrics, tensors ``()`` by name; see `step`.
        """
        stored, device = self.trajectories, self.backbone.device
        conditioning = self.conditioning(stored.prompts)
        latents, advantages = stored.latents.to(device), stored.advantages.to(device)
        old_log_probs, steps = stored.log_probs.to(device), stored.steps.tolist()
        first, log_probs = int(stored.num_updates) == 0, torch.zeros_like(old_log_probs)
        share = 1 / old_log_probs.numel()
        policy_loss, kl_loss, clipped = (latents.new_zeros(()) for _ in range(3))
        for rows in self.chunks(len(advantages)):
            predict = self.predictions(conditioning, rows)
            reference = self.predictions(conditioning, rows, reference=True)
            for i, step in enumerate(steps):
                before, after, std = latents[step, rows], latents[step + 1, rows], self.solver.c[step]
                mean = self.mean(predict, step, before)
                log_prob = step_log_prob(after, mean, std)
                log_probs[i, rows] = log_prob.detach()
                # The weights are those that sampled the trajectories, so the ratio is 1.
                old = log_prob.detach() if first else old_log_probs[i, rows]
                ratio = (log_prob - old).exp()
                loss = -share * clipped_objective(ratio, advantages[rows], self.clip_range).sum()
                policy_loss += loss.detach()
                clipped += share * ((ratio.detach() - 1).abs() > self.clip_range).sum()
                if self.kl_weight:
                    with torch.no_grad():
                        reference_mean = self.mean(reference, step, before)
                    kl = self.kl_weight * share * step_kl(mean, reference_mean, std).sum()
                    kl_loss += kl.detach()
                    loss = loss + kl
                backward(loss)
        if first:
            stored.log_probs = log_probs
        stored.num_updates += 1
        kl_metric = {"kl_loss": kl_loss} if self.kl_weight else {}
        return {"policy_loss": policy_loss, **kl_metric, "clip_fraction": clipped}

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes the prompts, and repeats each row for the images of its group.

        If guidance is enabled, the last row is that of the empty prompt.
        """
        guided = self.guidance != 1
        encoded = self.encode([*prompts, ""] if guided else prompts)
        rows = [i for i in range(len(prompts)) for _ in range(self.group_size)] + [len(prompts)] * guided
        return encoded[torch.tensor(rows, device=encoded.states.device)]

    def predictions(self, conditioning: Conditioning, rows: slice, reference: bool = False) -> list[Any]:
        """Returns the prediction function of each sampling step; see `longalign.trainers.make_predictions`.

        Args:
            conditioning: output of `conditioning` for all prompts.
            rows: slice of the images, for which the functions predict.
            reference: whether the reference model predicts, instead of the trained one.
        """
        guided = [self.guidance != 1] * len(self.solver)
        return make_predictions(self.backbone, conditioning, rows, guided, self.guidance, reference)

    def mean(self, predict: Sequence[Any], step: int, latents: Tensor) -> Tensor:
        """Returns the mean ``(b, c, h, w)`` of the distribution of the latents after a sampling step.

        Args:
            predict: output of `predictions`.
            step: index of the sampling step, from 0.
            latents: ``(b, c, h, w)`` latents before the step.
        """
        timesteps = torch.full((len(latents),), self.solver.timesteps[step], device=latents.device)
        return self.solver.step(step, latents, predict[step](latents, timesteps).to(latents.dtype))[0]

    def chunks(self, count: int) -> list[slice]:
        """Splits ``count`` images into slices of at most ``denoise_batch``, one per call of denoiser or decoder."""
        size = self.denoise_batch or count
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]
