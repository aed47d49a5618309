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
    """Scales of signal and noise of a model at each timestep: ``x_t = signal[t] * x_0 + noise[t] * n``.

    ``x_t`` is the noisy latent, ``x_0`` the clean latent, ``n`` standard normal noise, and ``s`` in [0, 1] the noise
    level of a flow-matching model. ``len()`` is the number of training timesteps.

    Attributes:
        signal: ``(T,)`` float64: ``sqrt(alphas_cumprod)`` for variance-preserving models, ``1 - s`` for flow matching.
        noise: ``(T,)`` float64: ``sqrt(1 - alphas_cumprod)``, or ``s`` for flow matching.
        num_timesteps: number of training timesteps; None if it is T. Later entries belong to sampling schedules of 1,
            2, 3, ... steps; see `from_flow` and `longalign.functional.sampling_timesteps`.
    """

    signal: Tensor
    noise: Tensor
    num_timesteps: int | None = None

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseLevels:
        """Returns the noise levels of a variance-preserving model from ``alphas_cumprod`` ``(T,)`` of its scheduler."""
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
        """Returns the scales ``1 - s`` of signal and ``s`` of noise of a rectified flow.

        At timestep t, ``s = shift u / (1 + (shift - 1) u)`` with ``u = (t + 1) / num_timesteps`` (arXiv 2403.03206,
        eq. 23). At the last timestep, ``s`` is 1: pure noise.

        If ``terminal`` or ``schedule_shifts`` is given, the levels of the schedules of 1, 2, ..., ``num_timesteps``
        sampling steps are stored after those of the training timesteps. Otherwise, sampling steps use the levels of the
        training timesteps.

        Args:
            num_timesteps: number of training timesteps.
            shift: positive number; a larger shift increases the noise levels, as larger images require. In the paper,
                the square root of the ratio of an image's number of pixels to that of the base resolution.
            terminal: noise level in (0, 1) of the last sampling step (``shift_terminal`` of diffusers), or None: the
                signal of all steps is multiplied by a constant, which depends on the number of steps.
            schedule_shifts: ``(num_timesteps,)`` shifts of the schedules of 1, 2, ... sampling steps; None: ``shift``.
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
        """Returns the scales of signal and noise at ``timesteps`` ``(b,)``, each of shape ``(b, 1, ...)``.

        They broadcast to ``like`` ``(b, ...)``, and have its dtype and device.
        """
        index, shape = timesteps.cpu(), (-1, *[1] * (like.ndim - 1))
        return self.signal[index].to(like).view(shape), self.noise[index].to(like).view(shape)


def add_noise(levels: NoiseLevels, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns noisy latents ``signal * latents + noise level * noise``, shape ``(b, ...)``.

    Args:
        levels: noise levels of the model.
        latents: ``(b, ...)`` clean latents.
        noise: ``(b, ...)`` standard normal noise.
        timesteps: ``(b,)`` timesteps, indices into ``levels``.
    """
    signal, sigma = levels.at(timesteps, latents)
    return signal * latents + sigma * noise


def training_target(prediction: str, levels: NoiseLevels, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns what a denoiser should predict in training, shape ``(b, ...)``.

    Args:
        prediction: prediction type: ``"epsilon"`` for the noise, ``"v_prediction"`` for the velocity
            ``signal * noise - noise level * latents`` (arXiv 2202.00512), or ``"flow"`` for ``noise - latents``.
        levels: noise levels of the model.
        latents: ``(b, ...)`` clean latents.
        noise: ``(b, ...)`` noise that was added to the latents.
        timesteps: ``(b,)`` training timesteps.

    Raises:
        ValueError: if the prediction type is unknown.
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
        density: ``"uniform"`` or ``"logit-normal"``. With the latter, a timestep is the fraction ``sigmoid(n)`` of the
            number of timesteps, with standard normal n. This favours intermediate noise levels, which are hardest to
            predict (arXiv 2403.03206, section 3.1, eq. 19, m = 0 and s = 1).
        levels: noise levels of the model; samples are from 0 to ``len(levels) - 1``.
        count: number of samples.
        device: device of the samples.

    Raises:
        ValueError: if the density is unknown.
    """
    if density == "uniform":
        return torch.randint(len(levels), (count,), device=device)
    if density not in DENSITIES:
        raise ValueError(f"unknown density of timesteps '{density}'; expected one of {', '.join(DENSITIES)}")
    position = torch.randn(count, device=device).sigmoid()
    return (position * len(levels)).long().clamp(max=len(levels) - 1)


def check_prediction(prediction: str) -> None:
    """Raises ValueError unless the prediction type is ``"epsilon"``, ``"v_prediction"`` or ``"flow"``."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction type '{prediction}'; expected one of {', '.join(PREDICTIONS)}")


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Applies classifier-free guidance (arXiv 2207.12598, eq. 6, w = scale - 1).

    Args:
        conditional: ``(b, ...)`` predictions for the prompts.
        unconditional: predictions of the same shape for the empty or negative prompt.
        scale: guidance scale; 1 returns ``conditional``. A tensor that broadcasts to ``(b, ...)`` sets a scale per
            prompt.

    Returns:
        The guided predictions ``(b, ...)``: ``unconditional + scale * (conditional - unconditional)``.
    """
    return unconditional + scale * (conditional - unconditional)


Guide = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""Combines conditional predictions, unconditional predictions and a guidance scale, as `guide` does."""


def guided_steps(levels: NoiseLevels, timesteps: Sequence[int], interval: tuple[float, float] | None) -> list[bool]:
    """Returns for each timestep whether guidance applies: if its noise level is in an interval (arXiv 2404.07724).

    Args:
        levels: noise levels of the model.
        timesteps: the sampling timesteps.
        interval: guidance applies if the ratio of noise to signal (`NoiseLevels.sigma`) is above the first and at most
            the second number. None: guidance applies at all timesteps.
    """
    low, high = interval or (-math.inf, math.inf)
    return [low < levels.sigma(t) <= high for t in timesteps]


def check_guidance_interval(levels: NoiseLevels, timesteps: Sequence[int], interval: tuple[float, float]) -> None:
    """Raises ValueError if guidance applies at none of the timesteps; see `guided_steps`."""
    if not any(guided_steps(levels, timesteps, interval)):
        sigmas = [levels.sigma(t) for t in timesteps]
        raise ValueError(
            f"no sampling step has a noise level in guidance_interval {interval[0]:g} to {interval[1]:g}; the "
            f"{len(sigmas)} steps have levels (ratio of noise to signal) from {min(sigmas):.3g} to {max(sigmas):.3g}. "
            "Widen the interval, or disable guidance with guidance 1"
        )


def predict_guided(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    timesteps: Tensor,
    scale: float | Tensor,
    combine: Guide = guide,
) -> Tensor:
    """Returns the prediction ``(b, ...)`` with classifier-free guidance, from one call of ``predict``.

    Args:
        predict: function ``(latents (2b, ...), timesteps (2b,)) -> (2b, ...)`` that returns b conditional, then b
            unconditional predictions. It gets the b latents and timesteps twice.
        latents: ``(b, ...)`` noisy latents.
        timesteps: ``(b,)`` timesteps.
        scale: guidance scale; see `guide`.
        combine: combines conditional and unconditional predictions, as `guide` does.
    """
    conditional, unconditional = predict(torch.cat([latents] * 2), torch.cat([timesteps] * 2)).chunk(2)
    return combine(conditional, unconditional, scale)
