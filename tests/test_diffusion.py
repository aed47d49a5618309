"""The maths of sampling, and its exact gradient beside plain autograd through the whole rollout."""

import math

import pytest
import torch
from tiny import tiny_unet
from torch import nn

from longalign.backbones.configs import LoraConfig
from longalign.backbones.lora import inject_lora
from longalign.diffusion import (
    NoiseLevels,
    add_noise,
    ddim,
    guide,
    lcm,
    pull_back,
    refuse_nonlinear,
    replay,
    rollout,
    trailing_timesteps,
    training_target,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LEVELS = NoiseLevels.from_alphas_cumprod((1 - BETAS).cumprod(0))
TIMES = torch.arange(1, 1001, dtype=torch.float64) / 1000
FLOW = NoiseLevels(1 - TIMES, TIMES)


def test_trailing_timesteps_of_fifty_and_four_steps():
    fifty = trailing_timesteps(50)
    assert fifty[:3] == (999, 979, 959) and fifty[-1] == 19 and len(fifty) == 50
    assert trailing_timesteps(4) == (999, 749, 499, 249)
    with pytest.raises(ValueError, match="between 1 and 1000 sampling steps, got 0"):
        trailing_timesteps(0)


@pytest.mark.parametrize(
    ("prediction", "levels"), [("epsilon", LEVELS), ("v_prediction", LEVELS), ("flow", FLOW)], ids=str
)
def test_the_true_answer_leads_ddim_to_the_image(prediction, levels):
    image, noise = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    solver = ddim(levels, trailing_timesteps(10), prediction)
    latents = add_noise(levels, image, noise, torch.tensor([999, 999]))
    for i, t in enumerate(solver.timesteps):
        answer = training_target(prediction, levels, image, noise, torch.tensor([t, t]))
        latents = solver.step(i, latents, answer)
        if i < 9:
            expected = add_noise(levels, image, noise, torch.tensor([solver.timesteps[i + 1]] * 2))
            assert torch.allclose(latents, expected, atol=1e-10)
    assert torch.allclose(latents, image, atol=1e-10)


def test_ddim_steps_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        trained_betas=BETAS.tolist(), clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    scheduler.timesteps = torch.tensor(trailing_timesteps(5))
    scheduler.num_inference_steps = 5
    solver = ddim(LEVELS, trailing_timesteps(5), "v_prediction")
    x, o = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    for i, t in enumerate(solver.timesteps):
        assert torch.allclose(solver.step(i, x, o), scheduler.step(o, t, x).prev_sample, atol=1e-5)


def test_lcm_steps_by_hand():
    solver = lcm(LEVELS, (999, 499), "epsilon")
    x, o, n = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    signal, noise = math.sqrt(LEVELS.signal[999] ** 2), float(LEVELS.noise[999])
    scaled = 10 * 999
    clean = (x - noise * o) / signal
    consistent = 0.25 / (scaled**2 + 0.25) * x + scaled / math.sqrt(scaled**2 + 0.25) * clean
    assert torch.allclose(solver.step(0, x, o, n), LEVELS.signal[499] * consistent + LEVELS.noise[499] * n)
    assert solver.c == (float(LEVELS.noise[499]), 0.0)


def test_weight_is_the_product_of_what_follows():
    solver = ddim(LEVELS, (999, 499, 249), "epsilon")
    assert solver.weight(0) == pytest.approx(solver.b[0] * solver.a[1] * solver.a[2])
    assert solver.weight(2) == solver.b[2]


def test_guidance():
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 7.5) == 16.0


def test_levels_without_signal_are_refused_for_noise_prediction():
    levels = NoiseLevels.from_alphas_cumprod(torch.linspace(1, 0, 10))
    with pytest.raises(ValueError, match="expected a v-prediction model"):
        ddim(levels, (9, 4), "epsilon")
    assert ddim(levels, (9, 4), "v_prediction").b[0] < 0
    with pytest.raises(ValueError, match="unknown prediction 'x0'; expected one of epsilon"):
        ddim(levels, (9, 4), "x0")


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_clipping_schedulers_are_refused(key):
    refuse_nonlinear({key: False, "beta_start": 0.1})
    with pytest.raises(ValueError, match=f"the scheduler sets {key}=true"):
        refuse_nonlinear({key: True})


def test_rollout_refuses_steps_that_are_not_there():
    with pytest.raises(ValueError, match="no step 3 among 3 sampling steps"):
        rollout(lambda x, t: x, torch.zeros(1, 1, 1, 1), ddim(LEVELS, trailing_timesteps(3), "epsilon"), [1, 3])


def plain(predict, noise, solver, chosen):
    """The reference: autograd through the whole rollout, the network's inputs detached (DRTune)."""
    latents = noise
    for i, t in enumerate(solver.timesteps):
        times = torch.full((len(noise),), t)
        with torch.set_grad_enabled(i in chosen):
            output = predict(latents.detach(), times)
        fresh = torch.randn_like(latents) if solver.c[i] else None
        latents = solver.step(i, latents, output, fresh)
    return latents


def exact(predict, noise, solver, chosen, loss, together=1):
    final, visits = rollout(predict, noise, solver, chosen)
    final = final.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(final), final)
    for start in range(0, len(visits), together):
        some = visits[start : start + together]
        pull_back(solver, some, replay(predict, some), gradient).backward()
    return final


def network(full, dtype, dropout, placement="down"):
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
        visits = len(latents) // 2
        told = torch.cat([states[:2].repeat(visits, 1, 1), states[2:].repeat(visits, 1, 1)])
        out = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), told, return_dict=False)[0]
        return guide(*out.chunk(2), 7.5)

    return predict, parameters


def gradients(parameters):
    out = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return out


CASES = {
    "ddim-epsilon-lora": (ddim(LEVELS, trailing_timesteps(8), "epsilon"), False),
    "ddim-v-lora": (ddim(LEVELS, trailing_timesteps(8), "v_prediction"), False),
    "ddim-epsilon-full": (ddim(LEVELS, trailing_timesteps(8), "epsilon"), True),
    "ddim-v-full": (ddim(LEVELS, trailing_timesteps(8), "v_prediction"), True),
    "flow-lora": (ddim(FLOW, trailing_timesteps(8), "flow"), False),
    "lcm-lora": (lcm(LEVELS, trailing_timesteps(4), "epsilon"), False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_autograd_through_the_rollout(case):
    solver, full = CASES[case]
    chosen = (1, 2, 3) if len(solver) == 4 else (1, 4, 7)
    torch.manual_seed(1)
    predict, parameters = network(full, torch.float64, dropout=0.2)
    noise, weights = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64)

    def loss(x):
        return (x * weights).sin().mean()

    torch.manual_seed(2)
    reference = plain(predict, noise, solver, chosen)
    loss(reference).backward()
    expected = gradients(parameters)

    torch.manual_seed(2)
    final = exact(predict, noise, solver, chosen, loss)
    got = gradients(parameters)

    assert torch.equal(final, reference)
    assert expected.norm() > 0
    assert (got - expected).norm() / expected.norm() < 1e-6


def test_dropout_after_up_is_repeated_too():
    solver = ddim(LEVELS, trailing_timesteps(4), "epsilon")
    predict, parameters = network(False, torch.float64, dropout=0.5, placement="up")
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    torch.manual_seed(2)
    plain(predict, noise, solver, (0, 2)).square().mean().backward()
    expected = gradients(parameters)
    torch.manual_seed(2)
    exact(predict, noise, solver, (0, 2), lambda x: x.square().mean())
    got = gradients(parameters)
    assert (got - expected).norm() / expected.norm() < 1e-6
    torch.manual_seed(3)  # other dropout, other gradient
    exact(predict, noise, solver, (0, 2), lambda x: x.square().mean())
    assert (gradients(parameters) - expected).norm() / expected.norm() > 1e-2


def test_single_precision_and_steps_repeated_together():
    solver = ddim(LEVELS, trailing_timesteps(6), "epsilon")
    predict, parameters = network(False, torch.float32, dropout=0.0)
    noise = torch.randn(2, 4, 4, 4)
    plain(predict, noise, solver, (0, 3, 5)).square().mean().backward()
    expected = gradients(parameters)
    for together in (1, 2, 3):
        exact(predict, noise, solver, (0, 3, 5), lambda x: x.square().mean(), together)
        got = gradients(parameters)
        assert (got - expected).norm() / expected.norm() < 1e-4


def test_replaying_leaves_the_random_numbers_alone():
    solver = ddim(LEVELS, trailing_timesteps(2), "epsilon")
    predict, _ = network(False, torch.float32, dropout=0.5)
    _, visits = rollout(predict, torch.randn(2, 4, 4, 4), solver, [0, 1])
    before = torch.get_rng_state()
    first, again = replay(predict, visits[:1]), replay(predict, visits[:1])
    assert torch.equal(first, again) and first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
