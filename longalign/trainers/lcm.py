"""Consistency distillation: a model that draws in a few steps without guidance (LCM, arXiv 2310.04378, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from longalign.backbones.base import Backbone
from longalign.diffusion import Solver, add_noise, ddim, lcm
from longalign.encoders.base import Conditioning, Encoder
from longalign.trainers.base import DiffusionTrainer, evaluating, guided_prediction, batch_latents, train_denoiser
from longalign.trainers.configs import LCMConfig


class LCMTrainer(DiffusionTrainer):
    """Teaches the denoiser to name the same end all along each trajectory of the start model.

    From a noised image the start model takes one guided DDIM step over a skip of timesteps; the student's consistency
    function at the first point is drawn to its own value at the second (LCM, algorithm 1). The student is not told the
    guidance scale: as in LCM-LoRA (arXiv 2311.05556) guidance goes into the weights, so the denoiser needs no input for
    it, which published text-to-image models do not have, and any LCM sampler draws with the result.

    The start model is the teacher: what ``init_from`` gave, its LoRAs merged. The encoder is frozen, since the teacher
    reads it too.

    Args:
        backbone: with what is trained of it already set, and the start model kept.
        encoder: encodes the captions.
        num_ddim_timesteps: DDIM steps from noise to image, which divide the timesteps; each is one skip.
        start_timesteps: ``"all"`` from half a skip on, or ``"ddim"`` for those of the DDIM steps alone.
        w_min: least guidance; the scale is 1 + w, with one w for each image, uniform from w_min to w_max.
        w_max: largest guidance.
        huber_c: c of the pseudo-Huber loss ``sqrt(d^2 + c^2) - c``, or None for the squared error.
        ema_decay: of the moving average that gives the target, or None for the student itself.
        timestep_scaling_factor: how fast the boundary condition leaves ``f(x, 0) = x``, see `longalign.diffusion.lcm`.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        *,
        num_ddim_timesteps: int = 50,
        start_timesteps: Literal["all", "ddim"] = "all",
        w_min: float = 6.5,
        w_max: float = 6.5,
        huber_c: float | None = 0.001,
        ema_decay: float | None = None,
        timestep_scaling_factor: float = 10.0,
    ):
        super().__init__(backbone, encoder, train_adapter=False)
        levels, total = backbone.noise_levels, len(backbone.noise_levels)
        self.skip, rest = divmod(total, num_ddim_timesteps)
        if rest:
            raise ValueError(
                f"the model's {total} timesteps cannot be divided into {num_ddim_timesteps} equal DDIM steps; set "
                "num_ddim_timesteps to a divisor"
            )
        first, by = (self.skip - 1, self.skip) if start_timesteps == "ddim" else (max(self.skip // 2, 1), 1)
        self.starts = torch.arange(first, total, by)
        self.w_min, self.w_max, self.huber_c = w_min, w_max, huber_c
        self.consistency = Steps(
            [lcm(levels, (t,), backbone.prediction, timestep_scaling=timestep_scaling_factor) for t in range(total)]
        )
        self.solve = Steps([ddim(levels, (t, max(t - self.skip, 0)), backbone.prediction) for t in range(total)])
        self.ema_decay = ema_decay
        trained = [(k, p) for k, p in backbone.denoiser.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained] if ema_decay is not None else []
        for i, (_, parameter) in enumerate(trained[: len(self.names)]):
            self.register_buffer(f"target_{i}", parameter.detach().clone())

    @classmethod
    def from_config(cls, config: LCMConfig, backbone: Backbone, encoder: Encoder) -> LCMTrainer:
        """Puts a new LoRA on the backbone, or makes all of it trainable, and takes the parts together."""
        if config.lora is None:
            backbone.keep_reference_model()
        train_denoiser(backbone, config.lora, "lcm")
        settings = {k: getattr(config, k) for k in type(config).model_fields if k not in ("name", "lora")}
        return cls(backbone, encoder, **settings)

    def check_fsdp_support(self) -> None:
        super().check_fsdp_support()
        if self.ema_decay is not None:
            raise ValueError(
                "the moving average of 'lcm' follows whole weights, and FSDP splits them over processes; set "
                "trainer.ema_decay to null, or use accelerate's multi-GPU without FSDP"
            )

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        latents = batch_latents(self.backbone, batch, "'lcm'")
        # one call for both branches of the teacher's guidance, so that both have the same length
        conditioning = self.encode([*batch["prompt"], ""])
        start = self.starts[torch.randint(len(self.starts), (len(latents),))].to(latents.device)
        noisy = add_noise(self.backbone.noise_levels, latents, torch.randn_like(latents), start)
        guidance = 1 + self.w_min + (self.w_max - self.w_min) * torch.rand((len(latents), 1, 1, 1)).to(latents)
        target = self.target(noisy, start, conditioning, guidance)
        output = self.backbone.predict(noisy, start, conditioning[: len(latents)]).float()
        away = self.consistency(start, noisy, output) - target
        if self.huber_c is None:
            return {"consistency_loss": away.square().mean()}
        return {"consistency_loss": ((away.square() + self.huber_c**2).sqrt() - self.huber_c).mean()}

    @torch.no_grad()
    def target(self, noisy: Tensor, start: Tensor, conditioning: Conditioning, guidance: Tensor) -> Tensor:
        """The consistency function's value where one guided step of the teacher leads.

        Args:
            noisy: ``(b, c, h, w)`` latents.
            start: ``(b,)`` their timesteps.
            told: conditioning of the b prompts and, after them, of the empty prompt.
            guidance: ``(b, 1, 1, 1)`` the teacher's guidance scales.
        """
        with evaluating(self.backbone.denoiser):
            rows = torch.arange(len(noisy), device=noisy.device)
            answer = guided_prediction(self.backbone.predict_reference, noisy, start, conditioning, rows, guidance)
            earlier = self.solve(start, noisy, answer.float())
            end = (start - self.skip).clamp(min=0)
            return self.consistency(end, earlier, self.predict_target(earlier, end, conditioning[: len(noisy)]).float())

    def predict_target(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """As `Backbone.predict`, by the average of the student's weights where there is one."""
        averages = dict(zip(self.names, self.averages(), strict=True))

        def denoise(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.backbone.denoiser, averages, args, kwargs)

        return self.backbone.call(denoise, latents, timesteps, conditioning)

    def averages(self) -> list[Tensor]:
        """The moving averages of the denoiser's trained weights; none without ``ema_decay``."""
        return [self.get_buffer(f"target_{i}") for i in range(len(self.names))]

    @torch.no_grad()
    def on_optimizer_step(self) -> None:
        if self.ema_decay is not None:
            parameters = dict(self.backbone.denoiser.named_parameters())
            for average, name in zip(self.averages(), self.names, strict=True):
                average.lerp_(parameters[name].to(average), 1 - self.ema_decay)


class Steps:
    """For each timestep ``a x + b o``, the first step of its solver, for batches of several timesteps.

    Args:
        solvers: one for each timestep, deterministic.
    """

    def __init__(self, solvers: Sequence[Solver]):
        # No buffers: casting the trainer to half precision must not round them.
        self.a = torch.tensor([solver.a[0] for solver in solvers], dtype=torch.float64)
        self.b = torch.tensor([solver.b[0] for solver in solvers], dtype=torch.float64)

    def __call__(self, timesteps: Tensor, latents: Tensor, output: Tensor) -> Tensor:
        """The step from ``timesteps`` ``(b,)`` for latents and outputs ``(b, c, h, w)``."""
        a, b = (factor.to(latents)[timesteps].view(-1, 1, 1, 1) for factor in (self.a, self.b))
        return a * latents + b * output
