"""The conformance check of a part of kind ``gradient_steps``, which selects the sampling steps with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longalign.functional.diffusion import NoiseLevels
from longalign.functional.rollout_gradient import replay_backward, rollout
from longalign.functional.solvers import ddim, trailing_timesteps
from longalign.gradient_steps.base import GradientSteps
from longalign.gradient_steps.config import GradientStepsConfig
from longalign.registry import gradient_steps
from longalign.testing.common import CPU, checked_config, config_checks, expect, run_checks

#: number of selections that are checked
REPEATS = 20


def check_gradient_steps(config: Any, *, num_steps: int = 20) -> None:
    """Checks that selections of gradient steps, the sampling steps that receive gradient, are valid.

    It checks the config (see `longalign.testing.common.config_checks`), and that selected steps are ascending and among
    the steps that are taken. The config's ``detaches()`` must equal ``detach`` of each selection: whether the
    denoiser's input is detached from the gradient. For a small float64
    network, the gradient of `longalign.functional.replay_backward` must equal that of autograd through all sampling
    steps (relative error below 1e-6).

    Args:
        config: name, mapping or config of the part.
        num_steps: number of sampling steps to select from.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("gradient_steps", config, GradientStepsConfig)
    selector = gradient_steps.construct(checked, CPU)

    def selections_are_valid() -> None:
        checked.check_steps(num_steps)
        for _ in range(REPEATS):
            chosen = selector.select(num_steps)
            expect(isinstance(chosen, GradientSteps), f"select must return GradientSteps, got {type(chosen).__name__}")
            length = num_steps if chosen.length is None else chosen.length
            expect(1 <= length <= num_steps, f"expected a length from 1 to {num_steps}, got {length}")
            valid = list(chosen.steps) == sorted(set(chosen.steps)) and all(0 <= s < length for s in chosen.steps)
            expect(valid and bool(chosen.steps), f"expected ascending steps below {length}, got {chosen.steps}")
            expect(
                chosen.detach == checked.detaches(),
                f"detaches() is {checked.detaches()}, but a selection has detach={chosen.detach}",
            )

    def gradient_equals_autograd() -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        levels = NoiseLevels.from_alphas_cumprod(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
        noise = torch.randn(2, 4, 1, 1, dtype=torch.float64)
        chosen = selector.select(num_steps)
        timesteps = trailing_timesteps(num_steps, 1000)[: chosen.length]
        solver = ddim(levels, timesteps, "epsilon")

        def predict(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return network(latents[..., 0, 0] + timesteps[:, None] / 1000)[..., None, None]

        final, recorded = rollout(predict, noise, solver, chosen.steps)
        final.requires_grad_()
        (gradient,) = torch.autograd.grad(final.square().sum(), final)
        for _, _, scalar in replay_backward(predict, solver, recorded, gradient, chosen.detach):
            scalar.backward()
        replayed = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

        network.zero_grad()
        latents, previous = noise, None
        for index, timestep in enumerate(solver.timesteps):
            carries = index in chosen.steps
            seen = latents.detach() if chosen.detach and carries else latents
            with torch.set_grad_enabled(carries):
                output = predict(seen, torch.full((2,), timestep))
            latents, previous = solver.step(index, latents, output, previous)
        latents.square().sum().backward()
        expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        error = float((replayed - expected).norm() / expected.norm())
        expect(error < 1e-6, f"the replayed gradient differs from autograd by {error:.2g} (relative)")

    run_checks(
        "gradient_steps",
        config,
        [*config_checks("gradient_steps", checked), selections_are_valid, gradient_equals_autograd],
    )
