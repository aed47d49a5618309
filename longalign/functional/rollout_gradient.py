"""Rollouts: sampling with linear steps, and the exact gradient of a loss with the memory of one network call.

A step is linear in latent ``x``, network output ``o(x)`` and fresh noise ``n``. In a multistep method, it is also
linear in the prediction ``m`` of the previous step: ``x' = a x + b o(x) + c n + d m`` and ``m' = p x + q o(x)``. Let
``g`` and ``u`` be the gradients of the loss with respect to ``x'`` and ``m'``. The gradient with respect to the output
is ``v = b g + q u``, and with respect to ``m`` it is ``d g``. The gradient with respect to ``x`` is ``a g + p u``, plus
``J^T v`` if the network's input is not detached, where ``J`` is the Jacobian of ``o``. No graph of the whole rollout is
therefore needed: the rollout runs without gradient and the loss is differentiated once at the final latent. The
selected network calls are then recomputed with gradient from the recorded latents, from last to first. The outputs of
all other calls are detached.

DRTune (arXiv 2405.00760) and LongAlign (arXiv 2410.11817, section 4) detach the inputs. Each vector ``v`` is then a
multiple of the gradient at the final latent. DRaFT (arXiv 2309.17400) and AlignProp (arXiv 2310.03739) do not detach
the inputs. Each recomputed call then requires the gradient of the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from longalign.functional.graph_budget import GraphBudget
from longalign.functional.solvers import Solver

#: ``(latents (b, c, h, w), timesteps (b,)) -> output (b, c, h, w)``
Predict = Callable[[Tensor, Tensor], Tensor]
#: one network for all steps, or one for each, e.g. with guidance only in some steps
Predicts = Predict | Sequence[Predict]


@dataclass(frozen=True)
class RandomState:
    """State of torch's global random generators: of the CPU and, if ``device`` is a GPU (CUDA or MPS), of that GPU.

    Attributes:
        cpu: state of the CPU's generator.
        device: device of the computations.
        accelerator: state of the GPU's generator; None if ``device`` is no GPU.
    """

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Returns the current state of the generators that computations on ``device`` use."""
        states = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
        state = states.get(device.type)
        return cls(torch.get_rng_state(), device, state() if state else None)

    def is_current(self) -> bool:
        """Whether torch's generators still have this state: no random number was sampled since."""
        now = RandomState.now(self.device)
        unchanged = self.accelerator is None or torch.equal(self.accelerator, now.accelerator)  # type: ignore[arg-type]
        return unchanged and torch.equal(self.cpu, now.cpu)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Context manager that sets this random state, and on exit restores the state from before."""
        before = RandomState.now(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()

    def restore(self) -> None:
        """Sets torch's global random generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.accelerator, self.device)
        else:
            torch.mps.set_rng_state(self.accelerator)


@dataclass(frozen=True)
class RecordedStep:
    """Network call in one step of a rollout (sampling), recorded so that it can be recomputed with gradient.

    Attributes:
        index: index of the step, counted from 0.
        latents: ``(b, c, h, w)`` network input.
        timesteps: ``(b,)`` timestep of each latent.
        random: torch's random state before the call, which makes dropout reproducible.
        output: ``(b, c, h, w)`` output of the call with its autograd graph; None if the call will be recomputed.
    """

    index: int
    latents: Tensor
    timesteps: Tensor
    random: RandomState
    output: Tensor | None = None


@torch.no_grad()
def rollout(
    predict: Predicts,
    noise: Tensor,
    solver: Solver,
    grad_steps: Collection[int] = (),
    predict_no_grad: Predicts | None = None,
    *,
    keep: bool | GraphBudget = False,
    detach: bool = True,
) -> tuple[Tensor, list[RecordedStep]]:
    """Samples latents from noise and records the network calls at ``grad_steps``, for `replay_backward`.

    Args:
        predict: the network, including guidance: ``(latents (b, c, h, w), timesteps (b,)) -> output (b, c, h, w)``; one
            for all steps, or a sequence with one per step.
        noise: ``(b, c, h, w)`` standard normal noise.
        solver: the sampling steps.
        grad_steps: indices, from 0, of the sampling steps that receive gradient.
        predict_no_grad: the network at all other steps, e.g. without dropout. None uses ``predict``.
        keep: whether the recorded calls keep their autograd graphs: True for all, False for none, a `GraphBudget` for
            those that fit into its memory. `replay_backward` does not recompute a call with a graph, which saves time
            but needs memory for the activations.
        detach: for calls that keep their graphs, whether the network's inputs are detached. `replay_backward` must get
            the same value.

    Returns:
        The final latents ``(b, c, h, w)``, without gradient, and the recorded steps, in the order of the steps.

    Raises:
        ValueError: if ``grad_steps`` contains an invalid index.
    """
    invalid = sorted(i for i in grad_steps if not 0 <= i < len(solver))
    if invalid:
        raise ValueError(
            f"grad_steps contains step {invalid[0]}; expected 0 to {len(solver) - 1}, the indices of the solver's steps"
        )
    latents, previous, recorded = noise, None, []
    for index, timestep in enumerate(solver.timesteps):
        timesteps = torch.full((len(noise),), timestep, device=noise.device)
        if index in grad_steps:
            budget = keep if isinstance(keep, GraphBudget) else None
            keeps = bool(keep) if budget is None else budget.allows()
            random, inputs = RandomState.now(noise.device), latents.detach().requires_grad_(keeps and not detach)
            with torch.set_grad_enabled(keeps), budget.counted() if budget and keeps else nullcontext():
                output = _at(predict, index)(inputs, timesteps)
            recorded.append(RecordedStep(index, inputs, timesteps, random, output if keeps else None))
        else:
            output = _at(predict_no_grad or predict, index)(latents, timesteps)
        new_noise = torch.randn_like(latents) if solver.c[index] else None
        latents, previous = solver.step(index, latents, output, previous, new_noise)
    return latents, recorded


def _at(predict: Predicts, index: int) -> Predict:
    return predict[index] if isinstance(predict, Sequence) else predict


def replay(predict: Predicts, recorded: Sequence[RecordedStep], latents: Tensor | None = None) -> Tensor:
    """Recomputes the network calls of r recorded steps with gradient, in one network call.

    Args:
        predict: the network, as for `rollout`; the steps must use one network.
        recorded: r steps, each recorded with b latents.
        latents: ``(r * b, c, h, w)`` latents of the recorded steps as a leaf tensor that receives gradient. None uses
            the recorded latents without gradient.

    Returns:
        Outputs ``(r * b, c, h, w)``, ordered by step.

    Raises:
        ValueError: if there are several steps and the network samples random numbers, e.g. for dropout. The random
            numbers would differ from those of the rollout.
    """
    inputs = torch.cat([step.latents for step in recorded]) if latents is None else latents
    timesteps, random = torch.cat([step.timesteps for step in recorded]), recorded[0].random
    with torch.enable_grad(), random.replayed():
        outputs = _at(predict, recorded[0].index)(inputs, timesteps)
        if len(recorded) > 1 and not random.is_current():
            raise ValueError(
                f"the network samples random numbers (dropout), which differ if {len(recorded)} calls are recomputed "
                "in one; disable dropout, or set replay_batch: 1"
            )
    return outputs


def replay_backward(
    predict: Predicts,
    solver: Solver,
    recorded: Sequence[RecordedStep],
    gradient: Tensor,
    detach: bool = True,
    calls_per_batch: int = 1,
) -> Iterator[tuple[Sequence[RecordedStep], Tensor, Tensor]]:
    """Backpropagates through the sampling steps of `rollout` by recomputing the recorded calls, from last to first.

    The iterator yields a scalar for each recomputed call. Call ``backward`` on the scalar, or on a sum that contains
    it, before advancing the iterator. The scalar may be scaled before ``backward``, e.g. for half precision. Calls that
    kept their graphs in `rollout` are not recomputed.

    Args:
        predict: the network of the rollout; steps with different networks are recomputed in separate calls.
        solver: the sampling steps of the rollout.
        recorded: the recorded steps, in the order of the rollout.
        gradient: ``(b, c, h, w)`` gradient of the loss with respect to the final latents.
        detach: whether the network's inputs are detached. If False, gradient also flows through the inputs to earlier
            recorded steps.
        calls_per_batch: maximum number of recorded steps recomputed in one call; must be 1 if ``detach`` is False.

    Yields:
        The r recorded steps of one call, their outputs ``(r * b, c, h, w)``, and a scalar. The gradient of the scalar
        with respect to the network's parameters equals the gradient of the loss through these outputs.

    Raises:
        ValueError: if ``calls_per_batch`` is above 1 and ``detach`` is False.
        RuntimeError: if ``detach`` is False and the iterator was advanced before ``backward``.
    """
    if calls_per_batch > 1 and not detach:
        raise ValueError(
            f"expected calls_per_batch=1 with detach=False, got {calls_per_batch}: each call requires the gradient of "
            "the next call; use detach=True to recompute several calls in one"
        )
    # gradients with respect to the latent and the remembered prediction that enter `next_step`
    next_step, gradient_remembered = len(solver), None
    for batch in _batches_from_last(predict, recorded, calls_per_batch):
        vectors: list[Tensor] = []
        for step in reversed(batch):
            vector = gradient
            for index in reversed(range(step.index, next_step)):
                gradient, vector, gradient_remembered = solver.step_backward(index, gradient, gradient_remembered)
            vectors.insert(0, vector)
            next_step = step.index
        input_grad = not detach and batch[0] is not recorded[0]
        kept = [step.output for step in batch if step.output is not None]
        if kept:
            latents, outputs = batch[0].latents, torch.cat(kept)
        else:
            latents = torch.cat([step.latents for step in batch]).requires_grad_(input_grad)
            outputs = replay(predict, batch, latents)
        scalar = (outputs * torch.cat(vectors).to(outputs.dtype)).sum()
        scales: list[Tensor] = []
        if input_grad:
            scalar.register_hook(scales.append)
        yield batch, outputs, scalar
        if input_grad:
            if not scales or latents.grad is None:
                raise RuntimeError("call backward() on each yielded scalar before advancing the iterator")
            gradient = gradient + latents.grad / scales[0]


def _batches_from_last(
    predict: Predicts, recorded: Sequence[RecordedStep], size: int
) -> Iterator[Sequence[RecordedStep]]:
    """Yields batches of at most ``size`` successive recorded steps that use one network, from last to first."""
    end = len(recorded)
    while end > 0:
        start, network = end - 1, _at(predict, recorded[end - 1].index)
        while start > max(end - size, 0) and _at(predict, recorded[start - 1].index) is network:
            start -= 1
        yield recorded[start:end]
        end = start
