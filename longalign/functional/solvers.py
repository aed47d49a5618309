"""Samplers with linear steps.

A step is linear in latent ``x``, network output ``o`` and fresh noise ``n``: ``x' = a * x + b * o + c * n``. This holds
for each prediction type: noise, velocity (v-prediction) and flow-matching velocity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longalign.functional.diffusion import NoiseLevels, check_prediction


def check_linear_sampling(scheduler: Mapping[str, Any]) -> None:
    """Checks that a scheduler config does not clip the predicted image, which would make a step non-linear.

    Args:
        scheduler: a diffusers scheduler config.

    Raises:
        ValueError: if a setting that clips is enabled; the message names the setting.
    """
    for key in ("clip_sample", "thresholding"):
        if scheduler.get(key):
            raise ValueError(
                f"the scheduler sets {key}=true, which makes sampling steps non-linear in the network's output and is "
                f"not supported. If the model was not trained this way, set {key} to false in scheduler_config.json"
            )


def trailing_timesteps(num_steps: int, num_timesteps: int = 1000) -> tuple[int, ...]:
    """Returns the sampling timesteps with ``trailing`` spacing, as in diffusers (arXiv 2305.08891, table 2).

    For 1000 training timesteps, 50 steps are 999, 979, ..., 19, and 4 steps are 999, 749, 499, 249.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"expected between 1 and {num_timesteps} sampling steps, got {num_steps}")
    return tuple(round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps))


@dataclass(frozen=True)
class Solver:
    """Coefficients of a sampler with linear steps ``x' = a * x + b * o + c * n``, from pure noise to a clean latent.

    Attributes:
        timesteps: timestep of each step, descending.
        a: factor of the latent ``x`` in each step.
        b: factor of the network's output ``o`` in each step.
        c: factor of fresh noise ``n`` in each step; 0 for a deterministic step.
    """

    timesteps: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, index: int, latents: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the latents after step ``index``, counted from 0; ``noise`` is required if ``c[index]`` is not 0."""
        latents = self.a[index] * latents + self.b[index] * output
        return latents if noise is None else latents + self.c[index] * noise


def _output_factors(prediction: str, signal: float, noise: float) -> tuple[float, float, float, float]:
    """Returns factors p, q, r, s such that ``x_0 = p * x + q * o`` and ``n = r * x + s * o``."""
    if prediction == "epsilon":
        if signal < 1e-6:
            raise ValueError(
                "the noise schedule has no signal at the last timestep, so the image cannot be computed from a noise "
                "prediction; use prediction 'v_prediction' with this schedule"
            )
        return 1 / signal, -noise / signal, 0.0, 1.0
    if prediction == "v_prediction":
        return signal, -noise, noise, signal
    check_prediction(prediction)
    return 1.0, -noise, 1.0, signal


def _coefficients(levels: NoiseLevels, timesteps: Sequence[int], prediction: str) -> Iterator[tuple[int, Any, Any]]:
    next_levels = [*((float(levels.signal[t]), float(levels.noise[t])) for t in timesteps[1:]), (1.0, 0.0)]
    for t, next_level in zip(timesteps, next_levels, strict=True):
        yield t, _output_factors(prediction, float(levels.signal[t]), float(levels.noise[t])), next_level


def ddim(levels: NoiseLevels, timesteps: Sequence[int], prediction: str) -> Solver:
    """Returns deterministic DDIM (arXiv 2010.02502, eq. 12). The last step returns the predicted ``x_0``.

    For flow matching, each step is an Euler step.
    """
    a, b = [], []
    for _, (p, q, r, s), (signal, noise) in _coefficients(levels, timesteps, prediction):
        a.append(signal * p + noise * r)
        b.append(signal * q + noise * s)
    return Solver(tuple(timesteps), tuple(a), tuple(b), (0.0,) * len(a))


def lcm(
    levels: NoiseLevels,
    timesteps: Sequence[int],
    prediction: str,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
) -> Solver:
    """Returns multistep consistency sampling (arXiv 2310.04378, algorithm 3), with fresh noise between steps.

    The consistency function is ``c_skip x + c_out x_0`` with ``c_skip = d^2 / (u^2 + d^2)``,
    ``c_out = u / sqrt(u^2 + d^2)``, ``u = timestep_scaling * t`` and ``d = sigma_data``.
    """
    a, b, c = [], [], []
    for t, (p, q, _, _), (signal, noise) in _coefficients(levels, timesteps, prediction):
        scaled = timestep_scaling * t
        skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        out = scaled / math.sqrt(scaled**2 + sigma_data**2)
        a.append(signal * (skip + out * p))
        b.append(signal * out * q)
        c.append(noise)
    return Solver(tuple(timesteps), tuple(a), tuple(b), tuple(c))
