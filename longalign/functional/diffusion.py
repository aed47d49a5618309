"""Functions for diffusion models: noise levels, prediction types and classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class NoiseLevels:
    """Scales of signal and noise at each timestep: ``x_t = signal[t] * x_0 + noise[t] * n``.

    ``x_0`` is the clean latent, ``n`` the noise, and ``s`` the noise level of a flow-matching model.

    Attributes:
        signal: ``(T,)`` float64: ``sqrt(alphas_cumprod)`` for variance-preserving models, ``1 - s`` for flow matching.
        noise: ``(T,)`` float64: ``sqrt(1 - alphas_cumprod)``, or ``s`` for flow matching.
        num_timesteps: number of training timesteps, if it is not T. The levels after these are those of sampling
            schedules, see `from_flow` and `longalign.functional.sampling_timesteps`.
    """

    signal: Tensor
    noise: Tensor
    num_timesteps: int | None = None

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseLevels:
        """Returns the levels of a variance-preserving model from ``alphas_cumprod`` ``(T,)``."""
        alphas = alphas_cumprod.double().cpu()
        return cls(alphas.sqrt(), (1 - alphas).sqrt())

    @classmethod
    def from_flow(
        cls,
        num_timesteps: int,
        shift: float = 1.0,
        terminal: float | None = None,
        schedule_shifts: Tensor | None = None,
    ) -> NoiseLevels:
        """Returns the levels ``1 - s`` and ``s`` of a rectified flow. The last timestep is pure noise.

        ``s = shift u / (1 + (shift - 1) u)`` with ``u = (t + 1) / num_timesteps`` (arXiv 2403.03206, eq. 23). A larger
        ``shift`` increases the noise levels, as larger images require. In the paper, ``shift`` is the square root of
        the ratio of the numbers of pixels.

        With ``schedule_shifts`` ``(num_timesteps,)``, the shift of n sampling steps depends on n. With ``terminal``,
        their signal is multiplied by a constant such that the noise level of the last step is ``terminal``
        (``shift_terminal`` of diffusers). The constant depends on n. If one of them is given, the levels of the
        schedules of 1 to ``num_timesteps`` steps follow those of the training timesteps, in this order.
        """

        def level(u: Tensor, shift: float | Tensor) -> Tensor:
            return shift * u / (1 + (shift - 1) * u)

        noise = level(torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps, shift)
        if terminal is None and schedule_shifts is None:
            return cls(1 - noise, noise)
        counts = torch.arange(1, num_timesteps + 1)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        steps = counts.repeat_interleave(counts).double()
        shifts = shift if schedule_shifts is None else schedule_shifts.double().repeat_interleave(counts)
        signal = 1 - level(1 - (torch.arange(len(first)) - first) / steps, shifts)
        if terminal is not None:
            # one step starts from pure noise, whose level cannot be changed
            signal = torch.where(steps > 1, signal * (1 - terminal) / (1 - level(1 / steps, shifts)), signal)
        return cls(torch.cat([1 - noise, signal]), torch.cat([noise, 1 - signal]), num_timesteps)

    def __len__(self) -> int:
        return len(self.signal) if self.num_timesteps is None else self.num_timesteps

    def sigma(self, timestep: int) -> float:
        """Returns the noise level of a timestep as in EDM (arXiv 2206.00364): the ratio of noise to signal."""
        return float(self.noise[timestep] / self.signal[timestep])

    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scales of signal and noise at ``timesteps`` ``(b,)``, broadcastable to ``like`` ``(b, ...)``."""
        index, shape = timesteps.cpu(), (-1, *[1] * (like.ndim - 1))
        return self.signal[index].to(like).view(shape), self.noise[index].to(like).view(shape)


def add_noise(levels: NoiseLevels, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Adds ``noise`` to latents ``(b, ...)`` of the same shape at the levels of ``timesteps`` ``(b,)``."""
    signal, sigma = levels.at(timesteps, latents)
    return signal * latents + sigma * noise


def training_target(prediction: str, levels: NoiseLevels, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns the regression target for a prediction type.

    The target is the noise, the velocity (v-prediction, arXiv 2202.00512, eq. 11), or the flow-matching velocity
    ``noise - latents``.

    Args:
        prediction: prediction type: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        levels: noise levels of the model.
        latents: ``(b, ...)`` clean latents.
        noise: noise of the same shape.
        timesteps: ``(b,)`` training timesteps.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "flow":
        return noise - latents
    check_prediction(prediction)
    signal, sigma = levels.at(timesteps, latents)
    return signal * noise - sigma * latents


DENSITIES = ("uniform", "logit-normal")


def sample_timesteps(density: str, levels: NoiseLevels, count: int, device: torch.device) -> Tensor:
    """Samples random training timesteps ``(count,)``.

    Args:
        density: ``"uniform"``, or ``"logit-normal"`` for ``sigmoid(n)`` with normal n. The latter favours intermediate
            noise levels, which are hardest to predict (arXiv 2403.03206, section 3.1, eq. 19, m = 0 and s = 1).
        levels: noise levels, one per training timestep.
        count: number of samples.
        device: device of the samples.
    """
    if density == "uniform":
        return torch.randint(len(levels), (count,), device=device)
    if density not in DENSITIES:
        raise ValueError(f"unknown density of timesteps '{density}'; expected one of {', '.join(DENSITIES)}")
    position = torch.randn(count, device=device).sigmoid()
    return (position * len(levels)).long().clamp(max=len(levels) - 1)


def check_prediction(prediction: str) -> None:
    """Raises ValueError if the prediction type is unknown."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction '{prediction}'; expected one of {', '.join(PREDICTIONS)}")


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Applies classifier-free guidance (arXiv 2207.12598, eq. 6, w = scale - 1).

    Args:
        conditional: ``(b, ...)`` predictions for the prompts.
        unconditional: predictions of the same shape for the empty or negative prompt.
        scale: guidance scale; 1 returns ``conditional``. A tensor that broadcasts to ``(b, ...)`` sets it per item.
    """
    return unconditional + scale * (conditional - unconditional)


Guide = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""Combines a conditional and an unconditional prediction, as `guide` does."""


def guided_steps(levels: NoiseLevels, timesteps: Sequence[int], interval: tuple[float, float] | None) -> list[bool]:
    """Returns for each timestep whether guidance applies: at noise levels in an interval (arXiv 2404.07724).

    Args:
        levels: noise levels of the model.
        timesteps: the sampling timesteps.
        interval: guidance applies if `NoiseLevels.sigma` is above the first and at most the second number, or always if
            None.
    """
    low, high = interval or (-math.inf, math.inf)
    return [low < levels.sigma(t) <= high for t in timesteps]


def check_guidance_interval(levels: NoiseLevels, timesteps: Sequence[int], interval: tuple[float, float]) -> None:
    """Raises ValueError if no timestep has a noise level in the interval; see `guided_steps`."""
    if not any(guided_steps(levels, timesteps, interval)):
        sigmas = [levels.sigma(t) for t in timesteps]
        raise ValueError(
            f"no sampling step has a noise level in guidance_interval {interval[0]:g} to {interval[1]:g}; the "
            f"{len(sigmas)} steps have levels from {min(sigmas):.3g} to {max(sigmas):.3g}. Widen the interval, or "
            "disable guidance with guidance 1"
        )


def predict_guided(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    timesteps: Tensor,
    scale: float | Tensor,
    combine: Guide = guide,
) -> Tensor:
    """Returns the prediction ``(b, ...)`` with classifier-free guidance, with both branches in one call.

    Args:
        predict: function ``(latents (2b, ...), timesteps (2b,)) -> (2b, ...)`` that returns the conditional, then the
            unconditional predictions.
        latents: ``(b, ...)`` noisy latents.
        timesteps: ``(b,)`` timesteps.
        scale: guidance scale; see `guide`.
        combine: combines the two branches; see `longalign.backbones.base.Backbone.guide`.
    """
    conditional, unconditional = predict(torch.cat([latents] * 2), torch.cat([timesteps] * 2)).chunk(2)
    return combine(conditional, unconditional, scale)
