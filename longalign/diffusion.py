"""Diffusion as tensor maths: noise levels, linear solvers, rollout, and the exact gradient of a rollout.

A solver step is linear in the latent and in the network's output, ``x' = a x + b o + c n``, whatever the output stands
for (noise, velocity). When the network reads detached latents at the chosen steps and the other steps carry no
gradient (DRTune, arXiv 2405.00760; LongAlign, arXiv 2410.11817, section 4), the final latent depends on a chosen
output through that recursion alone, so ``d final / d o_k = b_k * a_{k+1} * ... * a_n`` is a known number. A rollout
therefore needs no graph: sample without gradient, differentiate the loss at the final latent once, and run the chosen
calls again one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "flow")

#: ``(latents (b, c, h, w), timesteps (b,)) -> output (b, c, h, w)``
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NoiseLevels:
    """What is left of the image and what there is of noise at each timestep: ``x_t = signal[t] x_0 + noise[t] n``.

    Attributes:
        signal: ``(T,)`` float64; the root of the cumulated alphas for variance-preserving models, ``1 - s`` for flows.
        noise: ``(T,)`` float64.
    """

    signal: Tensor
    noise: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseLevels:
        """Levels of a variance-preserving model from its cumulated alphas ``(T,)``."""
        alphas = alphas_cumprod.double().cpu()
        return cls(alphas.sqrt(), (1 - alphas).sqrt())

    def __len__(self) -> int:
        return len(self.signal)

    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at ``timesteps`` ``(b,)``, shaped to multiply ``like`` ``(b, ...)``."""
        shape = (-1, *[1] * (like.ndim - 1))
        index = timesteps.cpu()
        return self.signal[index].to(like).view(shape), self.noise[index].to(like).view(shape)


def add_noise(levels: NoiseLevels, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Latents ``(b, ...)`` brought to ``timesteps`` ``(b,)`` with ``noise`` of the same shape."""
    signal, sigma = levels.at(timesteps, latents)
    return signal * latents + sigma * noise


def training_target(prediction: str, levels: NoiseLevels, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network should answer: the noise, the velocity (arXiv 2202.00512, eq. 11), or the flow ``n - x_0``."""
    if prediction == "epsilon":
        return noise
    if prediction == "flow":
        return noise - latents
    check_prediction(prediction)
    signal, sigma = levels.at(timesteps, latents)
    return signal * noise - sigma * latents


def check_prediction(prediction: str) -> None:
    """Raises ValueError for a kind of output that is not known."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction '{prediction}'; expected one of {', '.join(PREDICTIONS)}")


def refuse_nonlinear(scheduler: Mapping[str, Any]) -> None:
    """Refuses scheduler constants that clip the predicted image: a clipped step is not linear.

    Args:
        scheduler: the values of a diffusers scheduler config.

    Raises:
        ValueError: naming the setting.
    """
    for key in ("clip_sample", "thresholding"):
        if scheduler.get(key):
            raise ValueError(
                f"the scheduler sets {key}=true, which makes a sampling step non-linear in the network's output; "
                f"expected latents that are not clipped. Set {key} to false in scheduler_config.json if the model "
                "was not trained with it"
            )


def trailing_timesteps(num_steps: int, num_timesteps: int = 1000) -> tuple[int, ...]:
    """Timesteps spaced from the end, ``trailing`` in diffusers: 50 of 1000 are 999, 979, ..., 19; 4 are 999, 749, 499,
    249 (arXiv 2305.08891, table 2)."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"expected between 1 and {num_timesteps} sampling steps, got {num_steps}")
    return tuple(round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps))


@dataclass(frozen=True)
class Solver:
    """A sampler as linear steps ``x' = a x + b o + c n`` from pure noise to the image's latent.

    Attributes:
        timesteps: of each step, descending.
        a: factor of the latent.
        b: factor of the network's output.
        c: factor of fresh noise; 0 for a deterministic step.
    """

    timesteps: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, index: int, latents: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """Step ``index`` (0 is the first); ``noise`` is needed where ``c`` is not 0."""
        latents = self.a[index] * latents + self.b[index] * output
        return latents if noise is None else latents + self.c[index] * noise

    def weight(self, index: int) -> float:
        """``d final / d output`` of step ``index``, with the network's inputs detached."""
        return self.b[index] * math.prod(self.a[index + 1 :])


def _readout(prediction: str, signal: float, noise: float) -> tuple[float, float, float, float]:
    """p, q, r, s with ``x_0 = p x + q o`` and ``n = r x + s o``."""
    if prediction == "epsilon":
        if signal < 1e-6:
            raise ValueError(
                "the noise schedule has no signal at its last timestep, where noise prediction says nothing about the "
                "image; expected a v-prediction model with such a schedule"
            )
        return 1 / signal, -noise / signal, 0.0, 1.0
    if prediction == "v_prediction":
        return signal, -noise, noise, signal
    check_prediction(prediction)
    return 1.0, -noise, 1.0, signal


def _coefficients(levels: NoiseLevels, timesteps: Sequence[int], prediction: str) -> Iterator[tuple[int, Any, Any]]:
    following = [*((float(levels.signal[t]), float(levels.noise[t])) for t in timesteps[1:]), (1.0, 0.0)]
    for t, after in zip(timesteps, following, strict=True):
        yield t, _readout(prediction, float(levels.signal[t]), float(levels.noise[t])), after


def ddim(levels: NoiseLevels, timesteps: Sequence[int], prediction: str) -> Solver:
    """DDIM without noise (arXiv 2010.02502, eq. 12); its last step gives the predicted ``x_0``.

    For flows the same step is Euler's.
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
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3), with fresh noise between steps.

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


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6 with w = scale - 1)."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global generators: the CPU's and that of one accelerator, if there is one."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state, for computations on ``device``."""
        on_cuda = device.type == "cuda"
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if on_cuda else None)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers are those drawn after the state was taken; outside, nothing has changed."""
        with torch.random.fork_rng([self.device] if self.accelerator is not None else []):
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                torch.cuda.set_rng_state(self.accelerator, self.device)
            yield


@dataclass(frozen=True)
class Visit:
    """A call of the network during a rollout that is to be repeated with gradient.

    Attributes:
        index: of the step.
        latents: ``(b, c, h, w)`` what the network saw.
        timesteps: ``(b,)``.
        random: torch's random state before the call, so that dropout repeats.
    """

    index: int
    latents: Tensor
    timesteps: Tensor
    random: RandomState


@torch.no_grad()
def rollout(
    predict: Predict,
    noise: Tensor,
    solver: Solver,
    chosen: Collection[int] = (),
    predict_elsewhere: Predict | None = None,
) -> tuple[Tensor, list[Visit]]:
    """Samples without gradient and remembers the chosen calls.

    Args:
        predict: the network, guidance included.
        noise: ``(b, c, h, w)`` pure noise.
        solver: the steps.
        chosen: indices of the steps whose calls are to be repeated.
        predict_elsewhere: the network at the other steps, where it differs (e.g. without dropout).

    Returns:
        The final latents ``(b, c, h, w)`` and the visits, in the order of the steps.
    """
    outside = sorted(i for i in chosen if not 0 <= i < len(solver))
    if outside:
        raise ValueError(f"there is no step {outside[0]} among {len(solver)} sampling steps; expected 0 to the last")
    latents, visits = noise, []
    for index, timestep in enumerate(solver.timesteps):
        timesteps = torch.full((len(noise),), timestep, device=noise.device)
        if index in chosen:
            visits.append(Visit(index, latents, timesteps, RandomState.now(noise.device)))
        call = predict if index in chosen or predict_elsewhere is None else predict_elsewhere
        output = call(latents, timesteps)
        fresh = torch.randn_like(latents) if solver.c[index] else None
        latents = solver.step(index, latents, output, fresh)
    return latents, visits


def replay(predict: Predict, visits: Sequence[Visit]) -> Tensor:
    """Repeats visits with gradient in one call and returns their outputs ``(v * b, c, h, w)``, visit by visit.

    The random numbers are those of the first visit's own call, so only a single visit repeats its dropout exactly.
    """
    latents = torch.cat([v.latents for v in visits])
    timesteps = torch.cat([v.timesteps for v in visits])
    with torch.enable_grad(), visits[0].random.replayed():
        return predict(latents, timesteps)


def pull_back(solver: Solver, visits: Sequence[Visit], outputs: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient in the parameters is the loss's through these outputs.

    Args:
        solver: the steps of the rollout.
        visits: the ``v`` visits that ``outputs`` belong to.
        outputs: ``(v * b, c, h, w)`` from `replay`.
        gradient: ``(b, c, h, w)`` of the loss in the final latents.
    """
    vector = torch.cat([solver.weight(v.index) * gradient for v in visits])
    return (outputs * vector.to(outputs.dtype).detach()).sum()
