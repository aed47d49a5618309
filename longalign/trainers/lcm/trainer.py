"""Consistency distillation for sampling in a few steps without guidance (LCM, arXiv 2310.04378, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from longalign.backbones.base import Backbone
from longalign.encoders.base import Conditioning, Encoder
from longalign.functional.diffusion import NoiseLevels, add_noise
from longalign.functional.solvers import Solver, ddim, lcm
from longalign.runtime import Runtime
from longalign.trainers.diffusion import DiffusionTrainer, batch_latents, evaluating, guided_prediction, train_denoiser
from longalign.trainers.lcm.config import LCMConfig


class LCMTrainer(DiffusionTrainer):
    """Trains the denoiser to predict the same image from any point of a sampling trajectory of the teacher.

    The teacher takes one guided DDIM step from a noised image. The student's consistency function, which maps a noisy
    latent to a clean one, is trained to give at the start of this step what it gives at the end (LCM, algorithm 1).

    As in LCM-LoRA (arXiv 2311.05556), guidance is distilled into the weights, and the student is not conditioned on the
    guidance scale. The denoiser therefore needs no additional input, and any LCM sampler can be used.

    The teacher is the reference model: the backbone before training, with its LoRAs merged. The encoder is frozen,
    because teacher and student share it.

    Args:
        backbone: backbone with trainable parameters already set, and with a reference model.
        encoder: encodes the captions.
        num_ddim_timesteps: number of DDIM steps from noise to image; must divide the model's number of timesteps. The
            teacher takes one of these steps.
        start_timesteps: timesteps at which the teacher may start: ``"all"`` timesteps from half a DDIM step upwards, or
            only those of the ``"ddim"`` steps.
        w_min: minimum guidance w of the teacher, whose guidance scale is 1 + w. w is sampled for each image, uniformly
            from w_min to w_max.
        w_max: maximum guidance w.
        huber_c: c of the pseudo-Huber loss ``sqrt(d^2 + c^2) - c`` of the difference d; None for ``d^2``.
        ema_decay: decay of the moving average of the student, with which the target is computed. None computes the
            target with the student.
        timestep_scaling_factor: factor of the timestep in the boundary condition ``f(x, 0) = x``; see
            `longalign.functional.solvers.lcm`.

    Raises:
        ValueError: if ``num_ddim_timesteps`` does not divide the model's number of timesteps.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        *,
        num_ddim_timesteps: int,
        start_timesteps: Literal["all", "ddim"],
        w_min: float,
        w_max: float,
        huber_c: float | None,
        ema_decay: float | None,
        timestep_scaling_factor: float,
    ):
        super().__init__(backbone, encoder, train_adapter=False)
        noise_levels, num_timesteps = backbone.noise_levels, len(backbone.noise_levels)
        self.skip, remainder = divmod(num_timesteps, num_ddim_timesteps)
        if remainder:
            raise ValueError(
                f"the model's {num_timesteps} timesteps cannot be divided into {num_ddim_timesteps} equal DDIM steps; "
                f"set num_ddim_timesteps to a divisor of {num_timesteps}"
            )
        first, stride = (self.skip - 1, self.skip) if start_timesteps == "ddim" else (max(self.skip // 2, 1), 1)
        self.starts = torch.arange(first, num_timesteps, stride)
        self.w_min, self.w_max, self.huber_c = w_min, w_max, huber_c
        self.timestep_scaling_factor = timestep_scaling_factor
        self._steps: list[tuple[NoiseLevels, LinearSteps, LinearSteps]] = []
        self.consistency, self.solve = self.steps_of(noise_levels)
        self.ema_decay = ema_decay
        trainable = {name: p for name, p in backbone.denoiser.named_parameters() if p.requires_grad}
        averaged = trainable if ema_decay is not None else {}
        self.names = list(averaged)
        for i, parameter in enumerate(averaged.values()):
            self.register_buffer(f"target_{i}", parameter.detach().clone())

    @classmethod
    def from_config(cls, config: LCMConfig, runtime: Runtime, *, backbone: Backbone, encoder: Encoder) -> LCMTrainer:
        """Adds a new LoRA to the backbone, or makes all of the denoiser's weights trainable, and builds the trainer.

        In the second case, a copy of the weights is kept as the reference model.
        """
        if config.lora is None:
            backbone.keep_reference_model()
        train_denoiser(backbone, config.lora, "lcm")
        return cls(
            backbone,
            encoder,
            num_ddim_timesteps=config.num_ddim_timesteps,
            start_timesteps=config.start_timesteps,
            w_min=config.w_min,
            w_max=config.w_max,
            huber_c=config.huber_c,
            ema_decay=config.ema_decay,
            timestep_scaling_factor=config.timestep_scaling_factor,
        )

    def fsdp_module(self, precision: str) -> nn.Module:
        if self.ema_decay is not None:
            raise ValueError(
                "the moving average of 'lcm' does not support sharded weights; set trainer.ema_decay to null, or use "
                "accelerate's multi-GPU without FSDP"
            )
        return super().fsdp_module(precision)

    def steps_of(self, levels: NoiseLevels) -> tuple[LinearSteps, LinearSteps]:
        """Returns the consistency function and the teacher's DDIM step for noise levels; see `LinearSteps`.

        They are computed once for each object ``levels``.
        """
        for known, consistency, solve in self._steps:
            if known is levels:
                return consistency, solve
        prediction, scaling, timesteps = self.backbone.prediction, self.timestep_scaling_factor, range(len(levels))
        consistency = LinearSteps([lcm(levels, (t,), prediction, timestep_scaling=scaling) for t in timesteps])
        solve = LinearSteps([ddim(levels, (t, max(t - self.skip, 0)), prediction) for t in timesteps])
        self._steps.append((levels, consistency, solve))
        return consistency, solve

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        latents = batch_latents(self.backbone, batch, "'lcm'")
        levels = self.backbone.levels_at(latents.shape[1:])
        self.consistency, self.solve = self.steps_of(levels)
        # one call for both branches of the teacher's guidance, so that both are padded to the same length
        conditioning = self.encode([*batch["prompt"], ""])
        start = self.starts[torch.randint(len(self.starts), (len(latents),))].to(latents.device)
        noisy = add_noise(levels, latents, torch.randn_like(latents), start)
        guidance = 1 + self.w_min + (self.w_max - self.w_min) * torch.rand((len(latents), 1, 1, 1)).to(latents)
        target = self.target(noisy, start, conditioning, guidance)
        output = self.backbone.predict(noisy, start, conditioning[: len(latents)]).float()
        difference = self.consistency(start, noisy, output) - target
        if self.huber_c is None:
            return {"consistency_loss": difference.square().mean()}
        return {"consistency_loss": ((difference.square() + self.huber_c**2).sqrt() - self.huber_c).mean()}

    @torch.no_grad()
    def target(self, noisy: Tensor, start: Tensor, conditioning: Conditioning, guidance: Tensor) -> Tensor:
        """Returns the training target ``(b, c, h, w)``: the consistency function after one guided step of the teacher.

        Args:
            noisy: ``(b, c, h, w)`` noisy latents, from which the teacher starts.
            start: ``(b,)`` timesteps of these latents.
            conditioning: conditioning of the b prompts and, in the last row, of the empty prompt.
            guidance: ``(b, 1, 1, 1)`` guidance scales of the teacher.
        """
        with evaluating(self.backbone.denoiser):
            rows = torch.arange(len(noisy), device=noisy.device)
            output = guided_prediction(
                self.backbone.predict_reference, noisy, start, conditioning, rows, guidance, self.backbone.guide
            )
            earlier = self.solve(start, noisy, output.float())
            end = (start - self.skip).clamp(min=0)
            return self.consistency(end, earlier, self.predict_target(earlier, end, conditioning[: len(noisy)]).float())

    def predict_target(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the student's prediction; the arguments are those of `Backbone.predict`.

        If ``ema_decay`` is set, the student predicts with the moving averages of its weights.
        """
        averages = dict(zip(self.names, self.averages(), strict=True))

        def denoise(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.backbone.denoiser, averages, args, kwargs)

        return self.backbone.predict_with(denoise, latents, timesteps, conditioning)

    def averages(self) -> list[Tensor]:
        """Returns the moving averages of the denoiser's trainable weights, or an empty list without ``ema_decay``."""
        return [self.get_buffer(f"target_{i}") for i in range(len(self.names))]

    @torch.no_grad()
    def on_optimizer_step(self) -> None:
        if self.ema_decay is not None:
            parameters = dict(self.backbone.denoiser.named_parameters())
            for average, name in zip(self.averages(), self.names, strict=True):
                average.lerp_(parameters[name].to(average), 1 - self.ema_decay)


class LinearSteps:
    """Takes deterministic sampling steps in batches whose rows have different timesteps.

    A step leads from latents x and predictions o to ``a x + b o``, with factors a and b that depend on the timestep.

    Args:
        solvers: for each timestep from 0, a solver whose first step starts there; its other steps are not used.
    """

    def __init__(self, solvers: Sequence[Solver]):
        # not buffers, which casting the trainer to half precision would round
        self.a = torch.tensor([solver.a[0] for solver in solvers], dtype=torch.float64)
        self.b = torch.tensor([solver.b[0] for solver in solvers], dtype=torch.float64)

    def __call__(self, timesteps: Tensor, latents: Tensor, output: Tensor) -> Tensor:
        """Returns the latents ``(b, c, h, w)`` after the step.

        Args:
            timesteps: ``(b,)`` timesteps at which the step starts.
            latents: ``(b, c, h, w)`` latents at these timesteps.
            output: ``(b, c, h, w)`` predictions for these latents.
        """
        a, b = (rearrange(factor.to(latents)[timesteps], "b -> b 1 1 1") for factor in (self.a, self.b))
        return a * latents + b * output
