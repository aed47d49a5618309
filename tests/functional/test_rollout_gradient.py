"""The exact gradient of a rollout, compared with plain autograd through the whole rollout."""

from functools import cache

import pytest
import torch
from torch import nn

from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import inject_lora
from longalign.functional.diffusion import NoiseLevels, guide
from longalign.functional.graph_budget import GraphBudget
from longalign.functional.rollout_gradient import replay, replay_backward, rollout
from longalign.functional.solvers import ddim, dpmpp_2m, lcm, trailing_timesteps
from longalign.testing.tiny import tiny_unet

LEVELS = NoiseLevels.from_alphas_cumprod((1 - torch.linspace(0.03, 0.11, 1000, dtype=torch.float64) ** 2).cumprod(0))
TIMES = torch.arange(1, 1001, dtype=torch.float64) / 1000
FLOW = NoiseLevels(1 - TIMES, TIMES)
FOUR = trailing_timesteps(4)
SIX = ddim(LEVELS, trailing_timesteps(6), "epsilon")
MULTISTEP = {
    "epsilon": dpmpp_2m(LEVELS, trailing_timesteps(6), "epsilon"),
    "v_prediction": dpmpp_2m(LEVELS, trailing_timesteps(6), "v_prediction"),
    "flow": dpmpp_2m(FLOW, trailing_timesteps(6), "flow"),
}


def autograd_rollout(predict, noise, solver, grad_steps, detach=True):
    """Reference: one graph through the whole rollout."""
    latents, previous = noise, None
    for i, t in enumerate(solver.timesteps):
        with torch.set_grad_enabled(i in grad_steps):
            output = predict(latents.detach() if detach else latents, torch.full((len(noise),), t))
        new_noise = torch.randn_like(latents) if solver.c[i] else None
        latents, previous = solver.step(i, latents, output, previous, new_noise)
    return latents


def replayed_rollout(predict, noise, solver, grad_steps, loss, detach=True, calls_per_batch=1, scale=1.0):
    final, recorded = rollout(predict, noise, solver, grad_steps)
    final = final.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(final), final)
    for _, _, scalar in replay_backward(predict, solver, recorded, gradient, detach, calls_per_batch):
        (scale * scalar).backward()
    return final


@cache
def network(full=False, dtype=torch.float64, dropout=0.0, placement="down", guidance=7.5):
    """A guided UNet and its trainable parameters; the LoRA's up projections are non-zero."""
    unet = tiny_unet().to(dtype)
    if full:
        parameters = list(unet.parameters())
    else:
        unet.requires_grad_(False)
        parameters = inject_lora(unet, LoraConfig(rank=2, dropout=dropout, dropout_placement=placement), "x")
        unet.to(dtype)
        for p in parameters[1::2]:
            nn.init.normal_(p, std=0.3)
    unet.train()
    states = torch.randn(4, 3, 8, dtype=dtype)

    def predict(latents, timesteps):
        copies = len(latents) // 2
        conditioning = torch.cat([states[:2].repeat(copies, 1, 1), states[2:].repeat(copies, 1, 1)])
        output = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), conditioning, return_dict=False)[0]
        return guide(*output.chunk(2), guidance)

    return predict, parameters


def pop_gradients(parameters):
    gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return gradient


def relative_error(got, expected):
    assert expected.norm() > 0
    return ((got - expected).norm() / expected.norm()).item()


def mean_square(x):
    return x.square().mean()


SOLVERS = {
    "ddim-epsilon": ddim(LEVELS, FOUR, "epsilon"),
    "ddim-v": ddim(LEVELS, FOUR, "v_prediction"),
    "flow": ddim(FLOW, FOUR, "flow"),
    "lcm": lcm(LEVELS, FOUR, "epsilon"),
    "dpm++": dpmpp_2m(LEVELS, FOUR, "epsilon"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "undetached"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", SOLVERS)
def test_replay_backward_equals_autograd_through_rollout(name, full, detach, dtype):
    solver, grad_steps = SOLVERS[name], (0, 1, 3)
    predict, parameters = network(full, dtype, dropout=0.2)
    noise, weights = torch.randn(2, 2, 4, 4, 4, dtype=dtype)

    def loss(x):
        return (x * weights).sin().mean()

    torch.manual_seed(2)
    reference = autograd_rollout(predict, noise, solver, grad_steps, detach)
    loss(reference).backward()
    expected = pop_gradients(parameters)
    torch.manual_seed(2)
    final = replayed_rollout(predict, noise, solver, grad_steps, loss, detach)
    assert torch.equal(final, reference)
    assert relative_error(pop_gradients(parameters), expected) < (1e-6 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("calls_per_batch", [1, 3, "undetached"])
@pytest.mark.parametrize("grad_steps", [(2, 3), (0, 1, 3, 5)], ids=str)
@pytest.mark.parametrize("prediction", MULTISTEP)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_replay_backward_multistep_equals_autograd(guidance, prediction, grad_steps, calls_per_batch):
    solver, detach = MULTISTEP[prediction], calls_per_batch != "undetached"
    predict, parameters = network(guidance=guidance)
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    reference = autograd_rollout(predict, noise, solver, grad_steps, detach)
    mean_square(reference).backward()
    expected = pop_gradients(parameters)
    calls = calls_per_batch if detach else 1
    final = replayed_rollout(predict, noise, solver, grad_steps, mean_square, detach, calls, scale=8.0)
    assert torch.allclose(final, reference)
    assert relative_error(pop_gradients(parameters) / 8, expected) < 1e-6


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_replay_backward_detached_vectors_are_multiples_of_final_gradient(name):
    solver = {"ddim": SIX, "dpm++": MULTISTEP["epsilon"]}[name]
    _, recorded = rollout(lambda x, t: x, torch.randn(1, 1, 1, 1, dtype=torch.float64), solver, range(6))
    gradient = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    with torch.no_grad():
        replayed = list(replay_backward(lambda x, t: torch.ones_like(x), solver, recorded, gradient))
    # the factor of output i in the final latent: the rollout of an output that is 1 at step i and 0 elsewhere
    for i, (_, _, value) in zip(reversed(range(6)), replayed, strict=True):
        final, previous = torch.zeros(1, 1, 1, 1, dtype=torch.float64), None
        for j in range(6):
            final, previous = solver.step(j, final, torch.full_like(final, float(i == j)), previous)
        assert value.item() == pytest.approx(3 * final.item())


@pytest.mark.parametrize("detach", [True, False])
def test_replay_backward_repeats_dropout_after_up(detach):
    predict, parameters = network(dropout=0.5, placement="up")
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    torch.manual_seed(2)
    mean_square(autograd_rollout(predict, noise, SIX, (0, 2), detach)).backward()
    expected = pop_gradients(parameters)
    torch.manual_seed(2)
    replayed_rollout(predict, noise, SIX, (0, 2), mean_square, detach)
    assert relative_error(pop_gradients(parameters), expected) < 1e-6
    torch.manual_seed(3)  # different dropout, different gradient
    replayed_rollout(predict, noise, SIX, (0, 2), mean_square, detach)
    assert relative_error(pop_gradients(parameters), expected) > 1e-2


def test_replay_backward_undetached_includes_input_gradient():
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    replayed_rollout(predict, noise, SIX, (3, 5), mean_square, detach=True)
    detached = pop_gradients(parameters)
    replayed_rollout(predict, noise, SIX, (3, 5), mean_square, detach=False)
    assert relative_error(pop_gradients(parameters), detached) > 1e-3
    replayed_rollout(predict, noise, SIX, (5,), mean_square, detach=True)  # a single call has no input gradient
    single = pop_gradients(parameters)
    replayed_rollout(predict, noise, SIX, (5,), mean_square, detach=False)
    assert torch.equal(pop_gradients(parameters), single)


def test_replay_backward_calls_per_batch_keeps_gradient():
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    mean_square(autograd_rollout(predict, noise, SIX, (0, 3, 5))).backward()
    expected = pop_gradients(parameters)
    for calls_per_batch in (2, 4):
        replayed_rollout(predict, noise, SIX, (0, 3, 5), mean_square, calls_per_batch=calls_per_batch)
        assert relative_error(pop_gradients(parameters), expected) < 1e-6


@pytest.mark.parametrize("detach", [True, False])
def test_replay_backward_scaled_scalar_scales_gradient_once(detach):
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    replayed_rollout(predict, noise, SIX, (2, 3, 4), mean_square, detach)
    expected = pop_gradients(parameters)
    replayed_rollout(predict, noise, SIX, (2, 3, 4), mean_square, detach, scale=1024.0)
    assert relative_error(pop_gradients(parameters) / 1024, expected) < 1e-9


def test_replay_rejects_several_calls_with_dropout():
    predict, _ = network(dropout=0.5)
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    _, recorded = rollout(predict, noise, SIX, [0, 1])
    with pytest.raises(ValueError, match=r"dropout.* 2 calls.*replay_batch: 1"):
        replay(predict, recorded)


def test_replay_backward_undetached_needs_single_calls_and_backward():
    predict, _ = network()
    final, recorded = rollout(predict, torch.randn(2, 4, 4, 4, dtype=torch.float64), SIX, [0, 1])
    with pytest.raises(ValueError, match="calls_per_batch=1 with detach=False, got 2"):
        next(replay_backward(predict, SIX, recorded, final, detach=False, calls_per_batch=2))
    with pytest.raises(RuntimeError, match=r"backward\(\)"):
        list(replay_backward(predict, SIX, recorded, final, detach=False))


def test_replay_restores_random_state():
    predict, _ = network(dropout=0.5)
    _, recorded = rollout(predict, torch.randn(2, 4, 4, 4, dtype=torch.float64), SIX, [0, 1])
    before = torch.get_rng_state()
    outputs, repeated = replay(predict, recorded[:1]), replay(predict, recorded[:1])
    assert torch.equal(outputs, repeated) and outputs.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_rollout_rejects_grad_steps_out_of_range():
    with pytest.raises(ValueError, match=r"grad_steps.* 6; expected 0 to 5"):
        rollout(lambda x, t: x, torch.zeros(1, 1, 1, 1), SIX, [1, 6])


class SavedTensors:
    """Counts the elements of tensors saved for backward: current and peak."""

    def __init__(self):
        self.current = self.peak = 0

    def pack(self, tensor):
        return _Box(self, tensor)


class _Box:
    def __init__(self, saved, tensor):
        self.saved, self.tensor = saved, tensor
        saved.current += tensor.numel()
        saved.peak = max(saved.peak, saved.current)

    def __del__(self):
        self.saved.current -= self.tensor.numel()


@pytest.mark.parametrize("detach", [True, False])
def test_replay_backward_memory_independent_of_grad_steps(detach):
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)

    def peak(run):
        saved = SavedTensors()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda box: box.tensor):
            run()
        pop_gradients(parameters)
        return saved.peak

    two, six = (
        peak(lambda k=k: replayed_rollout(predict, noise, SIX, range(6 - k, 6), mean_square, detach)) for k in (2, 6)
    )
    full_graph = peak(lambda: mean_square(autograd_rollout(predict, noise, SIX, range(6), detach)).backward())
    assert six < 1.1 * two
    assert full_graph > 4 * six


def test_graph_budget_counts_saved_tensors_without_weights():
    inputs, weight = (torch.ones(4, requires_grad=True) for _ in range(2))
    budget = GraphBudget(80, [weight])
    assert budget.allows()
    with budget.counted():
        (inputs * weight).exp()  # saves inputs, weight and the result
    assert budget.used == 2 * 16
    assert budget.allows()
    with budget.counted():
        (inputs * weight).exp()
    assert not budget.allows()
