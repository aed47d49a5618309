"""Sampling as a rollout of linear steps, and its exact gradient with the memory of a single call of the network.

A step is linear in the latent and in the network's output, ``x' = a x + b o(x) + c n``. With g the loss's gradient in
the latent that a step gives, its gradient in the output is ``b g``, and in the latent that the step takes ``a g``, to
which ``J^T b g`` is added where the network's input is not detached; J is the Jacobian of ``o``. So a rollout needs no
graph: sample without gradient, differentiate the loss at the final latent once, and repeat the chosen calls from the
last to the first, each from the latent that it saw.

Inputs are detached in DRTune (arXiv 2405.00760) and LongAlign (arXiv 2410.11817, section 4), where the vectors are
multiples of the gradient at the final latent, and are not in DRaFT (arXiv 2309.17400) and AlignProp (arXiv 2310.03739),
where each call must follow the one after it. What the network answers at the other steps is a constant in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from longalign.diffusion import Solver

#: ``(latents (b, c, h, w), timesteps (b,)) -> output (b, c, h, w)``
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global generators: the CPU's and that of one accelerator, if there is one."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state, for computations on ``device``."""
        states = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
        state = states.get(device.type)
        return cls(torch.get_rng_state(), device, state() if state else None)

    def is_now(self) -> bool:
        """Whether no random number was drawn since the state was taken."""
        now = RandomState.now(self.device)
        same = self.accelerator is None or torch.equal(self.accelerator, now.accelerator)  # type: ignore[arg-type]
        return same and torch.equal(self.cpu, now.cpu)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers are those drawn after the state was taken; outside, nothing has changed."""
        before = RandomState.now(self.device)
        self._restore()
        try:
            yield
        finally:
            before._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.accelerator, self.device)
        else:
            torch.mps.set_rng_state(self.accelerator)


@dataclass(frozen=True)
class RecordedStep:
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
    grad_steps: Collection[int] = (),
    predict_no_grad: Predict | None = None,
) -> tuple[Tensor, list[RecordedStep]]:
    """Samples without gradient and remembers the chosen calls.

    Args:
        predict: the network, guidance included.
        noise: ``(b, c, h, w)`` pure noise.
        solver: the steps.
        chosen: indices of the steps whose calls are to be repeated.
        predict_no_grad: the network at the other steps, where it differs (e.g. without dropout).

    Returns:
        The final latents ``(b, c, h, w)`` and the visits, in the order of the steps.
    """
    outside = sorted(i for i in grad_steps if not 0 <= i < len(solver))
    if outside:
        raise ValueError(f"there is no step {outside[0]} among {len(solver)} sampling steps; expected 0 to the last")
    latents, recorded = noise, []
    for index, timestep in enumerate(solver.timesteps):
        timesteps = torch.full((len(noise),), timestep, device=noise.device)
        if index in grad_steps:
            recorded.append(RecordedStep(index, latents, timesteps, RandomState.now(noise.device)))
        call = predict if index in grad_steps or predict_no_grad is None else predict_no_grad
        output = call(latents, timesteps)
        fresh = torch.randn_like(latents) if solver.c[index] else None
        latents = solver.step(index, latents, output, fresh)
    return latents, recorded


def replay(predict: Predict, recorded: Sequence[RecordedStep], latents: Tensor | None = None) -> Tensor:
    """Repeats visits with gradient in one call.

    Args:
        predict: the network.
        visits: v of them.
        latents: ``(v * b, c, h, w)`` the visits' own as a leaf whose gradient is wanted, or None.

    Returns:
        Their outputs ``(v * b, c, h, w)``, visit by visit.

    Raises:
        ValueError: if the network draws random numbers (dropout), which cannot repeat for several visits at once.
    """
    seen = torch.cat([v.latents for v in recorded]) if latents is None else latents
    timesteps, random = torch.cat([v.timesteps for v in recorded]), recorded[0].random
    with torch.enable_grad(), random.replayed():
        outputs = predict(seen, timesteps)
        if len(recorded) > 1 and not random.is_now():
            raise ValueError(
                f"the network draws random numbers (dropout), which differ when {len(recorded)} calls are repeated in "
                "one; expected a network without dropout, or calls repeated one by one (replay_batch: 1)"
            )
    return outputs


def replay_backward(
    predict: Predict,
    solver: Solver,
    recorded: Sequence[RecordedStep],
    gradient: Tensor,
    detach: bool = True,
    calls_per_batch: int = 1,
) -> Iterator[tuple[Sequence[RecordedStep], Tensor, Tensor]]:
    """Repeats the visits of a rollout from the last to the first.

    Call ``backward`` on each scalar, or on a sum with it, before taking the next. It may be scaled there, as for half
    precision; the scale is found and taken out again.

    Args:
        predict: the network of the rollout.
        solver: its steps.
        visits: in the order of the steps.
        gradient: ``(b, c, h, w)`` of the loss in the final latents.
        detach: whether the network's inputs are constants; otherwise the gradient flows through them too.
        together: visits repeated in one call, for detached inputs.

    Yields:
        For each call its visits, their outputs ``(v * b, c, h, w)``, and a scalar whose gradient in the parameters is
        the loss's through these outputs.
    """
    if calls_per_batch > 1 and not detach:
        raise ValueError(
            f"where the gradient flows through the network's inputs each call needs the gradient of the next, so "
            f"{calls_per_batch} cannot be repeated in one; expected together = 1, or detached inputs"
        )
    following = len(solver)  # the step that takes the latent which `gradient` belongs to
    for end in range(len(recorded), 0, -calls_per_batch):
        some, vectors = recorded[max(end - calls_per_batch, 0) : end], []
        for step in reversed(some):
            gradient = math.prod(solver.a[step.index + 1 : following]) * gradient
            vectors.insert(0, solver.b[step.index] * gradient)
            gradient, following = solver.a[step.index] * gradient, step.index
        through = not detach and some[0] is not recorded[0]
        latents = torch.cat([v.latents for v in some]).requires_grad_(through)
        outputs = replay(predict, some, latents)
        scalar = (outputs * torch.cat(vectors).to(outputs.dtype)).sum()
        scales: list[Tensor] = []
        if through:
            scalar.register_hook(scales.append)
        yield some, outputs, scalar
        if through:
            if not scales or latents.grad is None:
                raise RuntimeError("the next call was asked for before backward of this one; expected backward first")
            gradient = gradient + latents.grad / scales[0]
