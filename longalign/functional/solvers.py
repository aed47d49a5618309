"""Samplers with linear steps.

A step is linear in latent ``x``, network output ``o`` and fresh noise ``n``. In a multistep method, it is also linear
in the clean latent ``m`` predicted in the previous step: ``x' = a x + b o + c n + d m`` and ``m' = p x + q o``. This
holds for each prediction type: noise, velocity (v-prediction) and flow-matching velocity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longalign.functional.diffusion import NoiseLevels, check_prediction


def check_linear_sampling(scheduler: Mapping[str, Any]) -> None:
    """Checks that a scheduler does not clip the predicted clean latent, which would make its steps non-linear.

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

    Args:
        num_steps: number of sampling steps.
        num_timesteps: number of training timesteps of the model.

    Raises:
        ValueError: if ``num_steps`` is not between 1 and ``num_timesteps``.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"expected between 1 and {num_timesteps} sampling steps, got {num_steps}; change the number of steps"
        )
    return tuple(round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps))


def sampling_timesteps(solver: str, levels: NoiseLevels, num_steps: int) -> tuple[int, ...]:
    """Returns the sampling timesteps of a solver, as indices into the noise levels.

    By default, the result is that of `trailing_timesteps`. If ``levels`` also contain noise levels of sampling
    schedules (see `NoiseLevels.from_flow`), the result is the indices of the schedule of ``num_steps`` steps. The
    solver ``"lcm"`` always gets trailing timesteps, because its models are distilled at these.

    Args:
        solver: ``"ddim"``, ``"dpm++"`` or ``"lcm"``.
        levels: noise levels of the model.
        num_steps: number of sampling steps.

    Raises:
        ValueError: if ``num_steps`` is not between 1 and the number of training timesteps.
    """
    trailing = trailing_timesteps(num_steps, len(levels))
    if solver == "lcm" or len(levels.noise) == len(levels):
        return trailing
    first = len(levels) + num_steps * (num_steps - 1) // 2
    return tuple(range(first, first + num_steps))


@dataclass(frozen=True)
class Solver:
    """Coefficients of a sampler with linear steps, from pure noise to a clean latent.

    A step maps latent ``x``, network output ``o``, fresh noise ``n`` and remembered prediction ``m`` to the next latent
    ``x' = a x + b o + c n + d m``. A multistep method also remembers the predicted clean latent ``m' = p x + q o`` for
    the next step. Each attribute has one entry per step; ``len()`` is the number of steps.

    Attributes:
        timesteps: timestep of each step, from the most to the least noise.
        a: factor of the latent ``x``.
        b: factor of the network's output ``o``.
        c: factor of fresh noise ``n``; 0 for a deterministic step.
        d: factor of the remembered prediction ``m``; 0 for a single-step method and in the first step.
        p: factor of the latent in the prediction ``m'``; 0 for a single-step method.
        q: factor of the network's output in the prediction ``m'``; 0 for a single-step method.
    """

    timesteps: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    d: tuple[float, ...]
    p: tuple[float, ...]
    q: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(
        self, index: int, latents: Tensor, output: Tensor, previous: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Takes one sampling step. All tensors have the shape of ``latents``.

        Args:
            index: index of the step, counted from 0.
            latents: latents before the step.
            output: the network's output for these latents.
            previous: the prediction returned by the previous step; required if ``d[index]`` is not 0.
            noise: standard normal noise; required if ``c[index]`` is not 0.

        Returns:
            The latents after the step, and the prediction to pass to the next step as ``previous``, which is None for
            single-step methods.
        """
        after = self.a[index] * latents + self.b[index] * output
        if noise is not None:
            after = after + self.c[index] * noise
        if previous is not None:
            after = after + self.d[index] * previous
        return after, self.p[index] * latents + self.q[index] * output if self.q[index] else None

    def step_backward(
        self, index: int, gradient: Tensor, gradient_remembered: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Backpropagates through one sampling step; the network's output counts as independent of the latents.

        All gradients have the shape of the latents.

        Args:
            index: index of the step, counted from 0.
            gradient: gradient with respect to the latents after the step.
            gradient_remembered: gradient with respect to the prediction returned by `step`; None means 0.

        Returns:
            Gradients with respect to the arguments ``latents``, ``output`` and ``previous`` of `step`. The gradient of
            ``previous`` is None if ``d[index]`` is 0.
        """
        latents, output = self.a[index] * gradient, self.b[index] * gradient
        if gradient_remembered is not None:
            latents = latents + self.p[index] * gradient_remembered
            output = output + self.q[index] * gradient_remembered
        return latents, output, self.d[index] * gradient if self.d[index] else None


def _single_step(timesteps: Sequence[int], a: Sequence[float], b: Sequence[float], c: Sequence[float]) -> Solver:
    zeros = (0.0,) * len(a)
    return Solver(tuple(timesteps), tuple(a), tuple(b), tuple(c), d=zeros, p=zeros, q=zeros)


def _output_factors(prediction: str, signal: float, noise: float) -> tuple[float, float, float, float]:
    """Returns factors p, q, r, s: clean latent ``p x + q o`` and noise ``r x + s o`` of latent x and output o."""
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


def ddim(levels: NoiseLevels, timesteps: Sequence[int], prediction: str, eta: float = 0.0) -> Solver:
    """Returns the solver DDIM (arXiv 2010.02502, eq. 12). The last step returns the predicted clean latent.

    For flow matching, each deterministic step is an Euler step.

    Args:
        levels: noise levels of the model.
        timesteps: sampling timesteps, from the most to the least noise; see `sampling_timesteps`.
        prediction: prediction type: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        eta: scale of the fresh noise, from 0 (deterministic) to 1 (ancestral sampling). The standard deviation of the
            fresh noise is ``eta * noise' * sqrt(1 - (sigma' / sigma)^2)``: eq. 16 of the paper, for any noise levels.
            Here ``noise'`` is the noise level after the step, and ``sigma`` and ``sigma'`` are the ratios of noise to
            signal before and after it. For any ``eta``, the latents have the same distribution at each noise level. For
            flow matching and many small steps, this is the SDE of Flow-GRPO (arXiv 2505.05470) with the noise scale
            ``sqrt(2) eta``.

    Raises:
        ValueError: if ``eta`` is not between 0 and 1, the prediction type is unknown, or ``"epsilon"`` is used with a
            timestep without signal.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta between 0 and 1, got {eta}; change eta")
    a, b, c = [], [], []
    for t, (p, q, r, s), (signal, noise) in _coefficients(levels, timesteps, prediction):
        ratio = 1.0 if eta == 0 else noise * float(levels.signal[t]) / (signal * float(levels.noise[t]))
        fresh = eta * noise * math.sqrt(1 - ratio**2)
        predicted = math.sqrt(noise**2 - fresh**2)  # factor of the predicted noise
        a.append(signal * p + predicted * r)
        b.append(signal * q + predicted * s)
        c.append(fresh)
    return _single_step(timesteps, a, b, c)


def dpmpp_2m(levels: NoiseLevels, timesteps: Sequence[int], prediction: str) -> Solver:
    """Returns the solver DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second-order, multistep, deterministic.

    The clean latents predicted in the current and the previous step are extrapolated linearly in the log of the
    signal-to-noise ratio. First and last step are of first order (DDIM); the last step returns the predicted clean
    latent. If the first timestep has no signal, the log is infinite there, and the second step is of first order too.
    Arguments and errors are those of `ddim`, without ``eta``.
    """
    a, b, d, p, q = [], [], [], [], []
    previous_size = math.inf  # no previous prediction in the first step
    for t, (p_t, q_t, _, _), (next_signal, next_noise) in _coefficients(levels, timesteps, prediction):
        signal, noise = float(levels.signal[t]), float(levels.noise[t])
        size = _log_snr(next_signal, next_noise) - _log_snr(signal, noise)
        extrapolation = size / (2 * previous_size) if math.isfinite(size) else 0.0  # 1 / (2 r) in the paper
        factor = next_signal - next_noise * signal / noise  # of the extrapolated x_0
        a.append(next_noise / noise + factor * (1 + extrapolation) * p_t)
        b.append(factor * (1 + extrapolation) * q_t)
        d.append(-factor * extrapolation)
        p.append(p_t)
        q.append(q_t)
        previous_size = size
    return Solver(tuple(timesteps), tuple(a), tuple(b), (0.0,) * len(a), tuple(d), tuple(p), tuple(q))


def _log_snr(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return math.log(signal / noise) if signal > 0 else -math.inf


def lcm(
    levels: NoiseLevels,
    timesteps: Sequence[int],
    prediction: str,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
) -> Solver:
    """Returns the solver of multistep consistency sampling (arXiv 2310.04378, algorithm 3).

    Fresh noise is added between steps. At timestep t, latent ``x`` and predicted clean latent ``x_0``, the consistency
    function is ``c_skip x + c_out x_0`` with ``c_skip = d^2 / (u^2 + d^2)`` and ``c_out = u / sqrt(u^2 + d^2)``.

    Args:
        levels: noise levels of the model.
        timesteps: sampling timesteps, from the most to the least noise; see `sampling_timesteps`.
        prediction: prediction type: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        sigma_data: constant ``d``; must be the value with which the model was distilled.
        timestep_scaling: ratio ``u / t``; must be the value with which the model was distilled.

    Raises:
        ValueError: if the prediction type is unknown, or ``"epsilon"`` is used with a timestep without signal.
    """
    a, b, c = [], [], []
    for t, (p, q, _, _), (signal, noise) in _coefficients(levels, timesteps, prediction):
        scaled = timestep_scaling * t
        skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        out = scaled / math.sqrt(scaled**2 + sigma_data**2)
        a.append(signal * (skip + out * p))
        b.append(signal * out * q)
        c.append(noise)
    return _single_step(timesteps, a, b, c)
