"""The exact gradient of a rollout beside plain autograd through all of it."""

from functools import cache

import pytest
import torch
from tiny import tiny_unet
from torch import nn

from longalign.backbones.configs import LoraConfig
from longalign.backbones.lora import inject_lora
from longalign.diffusion import NoiseLevels, ddim, guide, lcm, trailing_timesteps
from longalign.rollout import replay, replay_backward, rollout

LEVELS = NoiseLevels.from_alphas_cumprod((1 - torch.linspace(0.03, 0.11, 1000, dtype=torch.float64) ** 2).cumprod(0))
TIMES = torch.arange(1, 1001, dtype=torch.float64) / 1000
FLOW = NoiseLevels(1 - TIMES, TIMES)
FOUR = trailing_timesteps(4)
SIX = ddim(LEVELS, trailing_timesteps(6), "epsilon")


def plain(predict, noise, solver, grad_steps, detach=True):
    """The reference: one graph through the whole rollout."""
    latents = noise
    for i, t in enumerate(solver.timesteps):
        with torch.set_grad_enabled(i in grad_steps):
            output = predict(latents.detach() if detach else latents, torch.full((len(noise),), t))
        fresh = torch.randn_like(latents) if solver.c[i] else None
        latents = solver.step(i, latents, output, fresh)
    return latents


def exact(predict, noise, solver, grad_steps, loss, detach=True, calls_per_batch=1, scale=1.0):
    final, recorded = rollout(predict, noise, solver, grad_steps)
    final = final.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(final), final)
    for _, _, scalar in replay_backward(predict, solver, recorded, gradient, detach, calls_per_batch):
        (scale * scalar).backward()
    return final


@cache
def network(full=False, dtype=torch.float64, dropout=0.0, placement="down"):
    """A guided UNet and its trainable parameters; the LoRA's up projection is moved away from zero."""
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
        recorded = len(latents) // 2
        conditioning = torch.cat([states[:2].repeat(recorded, 1, 1), states[2:].repeat(recorded, 1, 1)])
        out = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), conditioning, return_dict=False)[0]
        return guide(*out.chunk(2), 7.5)

    return predict, parameters


def gradients(parameters):
    out = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return out


def distance(got, expected):
    assert expected.norm() > 0
    return ((got - expected).norm() / expected.norm()).item()


def square(x):
    return x.square().mean()


SOLVERS = {
    "ddim-epsilon": ddim(LEVELS, FOUR, "epsilon"),
    "ddim-v": ddim(LEVELS, FOUR, "v_prediction"),
    "flow": ddim(FLOW, FOUR, "flow"),
    "lcm": lcm(LEVELS, FOUR, "epsilon"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "undetached"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_gradient_is_that_of_autograd_through_the_rollout(name, full, detach, dtype):
    solver, grad_steps = SOLVERS[name], (0, 1, 3)
    predict, parameters = network(full, dtype, dropout=0.2)
    noise, weights = torch.randn(2, 2, 4, 4, 4, dtype=dtype)

    def loss(x):
        return (x * weights).sin().mean()

    torch.manual_seed(2)
    reference = plain(predict, noise, solver, grad_steps, detach)
    loss(reference).backward()
    expected = gradients(parameters)
    torch.manual_seed(2)
    final = exact(predict, noise, solver, grad_steps, loss, detach)
    assert torch.equal(final, reference)
    assert distance(gradients(parameters), expected) < (1e-6 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("detach", [True, False])
def test_dropout_after_up_is_repeated_too(detach):
    predict, parameters = network(dropout=0.5, placement="up")
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    torch.manual_seed(2)
    square(plain(predict, noise, SIX, (0, 2), detach)).backward()
    expected = gradients(parameters)
    torch.manual_seed(2)
    exact(predict, noise, SIX, (0, 2), square, detach)
    assert distance(gradients(parameters), expected) < 1e-6
    torch.manual_seed(3)  # other dropout, other gradient
    exact(predict, noise, SIX, (0, 2), square, detach)
    assert distance(gradients(parameters), expected) > 1e-2


def test_what_flows_through_inputs_is_part_of_the_gradient():
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    exact(predict, noise, SIX, (3, 5), square, detach=True)
    detached = gradients(parameters)
    exact(predict, noise, SIX, (3, 5), square, detach=False)
    assert distance(gradients(parameters), detached) > 1e-3
    exact(predict, noise, SIX, (5,), square, detach=True)  # nothing of it with a single call
    alone = gradients(parameters)
    exact(predict, noise, SIX, (5,), square, detach=False)
    assert torch.equal(gradients(parameters), alone)


def test_steps_repeated_together():
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    square(plain(predict, noise, SIX, (0, 3, 5))).backward()
    expected = gradients(parameters)
    for calls_per_batch in (2, 4):
        exact(predict, noise, SIX, (0, 3, 5), square, calls_per_batch=calls_per_batch)
        assert distance(gradients(parameters), expected) < 1e-6


@pytest.mark.parametrize("detach", [True, False])
def test_a_scale_put_on_backward_scales_the_gradient_once(detach):
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    exact(predict, noise, SIX, (2, 3, 4), square, detach)
    expected = gradients(parameters)
    exact(predict, noise, SIX, (2, 3, 4), square, detach, scale=1024.0)
    assert distance(gradients(parameters) / 1024, expected) < 1e-9


def test_calls_that_draw_random_numbers_are_not_repeated_together():
    predict, _ = network(dropout=0.5)
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    _, recorded = rollout(predict, noise, SIX, [0, 1])
    with pytest.raises(ValueError, match="which differ when 2 calls are repeated in one"):
        replay(predict, recorded)


def test_undetached_calls_are_not_repeated_together_and_wait_for_backward():
    predict, _ = network()
    final, recorded = rollout(predict, torch.randn(2, 4, 4, 4, dtype=torch.float64), SIX, [0, 1])
    with pytest.raises(ValueError, match="2 cannot be repeated in one"):
        next(replay_backward(predict, SIX, recorded, final, detach=False, calls_per_batch=2))
    with pytest.raises(RuntimeError, match="expected backward first"):
        list(replay_backward(predict, SIX, recorded, final, detach=False))


def test_replaying_leaves_the_random_numbers_alone():
    predict, _ = network(dropout=0.5)
    _, recorded = rollout(predict, torch.randn(2, 4, 4, 4, dtype=torch.float64), SIX, [0, 1])
    before = torch.get_rng_state()
    first, again = replay(predict, recorded[:1]), replay(predict, recorded[:1])
    assert torch.equal(first, again) and first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no step 6 among 6 sampling steps"):
        rollout(lambda x, t: x, torch.zeros(1, 1, 1, 1), SIX, [1, 6])


class Held:
    """Counts what graphs hold at the same time, in elements."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        return _Box(self, tensor)


class _Box:
    def __init__(self, held, tensor):
        self.held, self.tensor = held, tensor
        held.now += tensor.numel()
        held.peak = max(held.peak, held.now)

    def __del__(self):
        self.held.now -= self.tensor.numel()


@pytest.mark.parametrize("detach", [True, False])
def test_memory_does_not_grow_with_the_steps_that_carry_gradient(detach):
    predict, parameters = network()
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)

    def peak(run):
        held = Held()
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda box: box.tensor):
            run()
        gradients(parameters)
        return held.peak

    two, six = (peak(lambda k=k: exact(predict, noise, SIX, range(6 - k, 6), square, detach)) for k in (2, 6))
    whole = peak(lambda: square(plain(predict, noise, SIX, range(6), detach)).backward())
    assert six < 1.1 * two
    assert whole > 4 * six
