"""Noise levels, training targets, and solver steps."""

import math
from itertools import pairwise

import pytest
import torch

from longalign.functional.diffusion import NoiseLevels, add_noise, guide, sample_timesteps, training_target
from longalign.functional.solvers import (
    check_linear_sampling,
    ddim,
    dpmpp_2m,
    lcm,
    sampling_timesteps,
    trailing_timesteps,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LEVELS = NoiseLevels.from_alphas_cumprod((1 - BETAS).cumprod(0))
TIMES = torch.arange(1, 1001, dtype=torch.float64) / 1000
FLOW = NoiseLevels(1 - TIMES, TIMES)


def test_trailing_timesteps_values():
    fifty = trailing_timesteps(50)
    assert fifty[:3] == (999, 979, 959) and fifty[-1] == 19 and len(fifty) == 50
    assert trailing_timesteps(4) == (999, 749, 499, 249)
    with pytest.raises(ValueError, match=r"between 1 and 1000 .*got 0"):
        trailing_timesteps(0)


@pytest.mark.parametrize(
    ("prediction", "levels"), [("epsilon", LEVELS), ("v_prediction", LEVELS), ("flow", FLOW)], ids=str
)
def test_ddim_with_training_target_recovers_image(prediction, levels):
    image, noise = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    solver = ddim(levels, trailing_timesteps(10), prediction)
    latents = add_noise(levels, image, noise, torch.tensor([999, 999]))
    for i, t in enumerate(solver.timesteps):
        target = training_target(prediction, levels, image, noise, torch.tensor([t, t]))
        latents, _ = solver.step(i, latents, target)
        if i < 9:
            expected = add_noise(levels, image, noise, torch.tensor([solver.timesteps[i + 1]] * 2))
            assert torch.allclose(latents, expected, atol=1e-10)
    assert torch.allclose(latents, image, atol=1e-10)


@pytest.mark.parametrize(("prediction", "levels"), [("epsilon", LEVELS), ("flow", FLOW)], ids=str)
def test_ddim_with_noise_keeps_the_distribution_of_each_level(prediction, levels):
    image, noise = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64).unbind(0)
    timesteps = (999, 600, 200) if prediction == "flow" else (990, 600, 200)
    solver = ddim(levels, timesteps, prediction, eta=0.8)
    for i, (t, after) in enumerate(pairwise(timesteps)):
        at, then = torch.tensor([t]), torch.tensor([after])
        latents = add_noise(levels, image, noise, at)
        mean, _ = solver.step(i, latents, training_target(prediction, levels, image, noise, at))
        # what the step keeps of the old noise and the fresh noise have the variance of the next level
        old = (mean - levels.signal[after] * image) / noise
        assert torch.allclose(old**2 + solver.c[i] ** 2, levels.noise[then] ** 2)
    assert solver.c[0] > 0 and solver.c[-1] == 0


def test_ddim_with_noise_equals_diffusers_and_the_sde_of_a_flow():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(trained_betas=BETAS.tolist(), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    solver = ddim(LEVELS, trailing_timesteps(5), "epsilon", eta=0.5)
    x, o, n = torch.randn(3, 1, 4, 2, 2).unbind(0)
    for i, t in enumerate(solver.timesteps[:-1]):
        expected = scheduler.step(o, t, x, eta=0.5, variance_noise=n).prev_sample
        assert torch.allclose(solver.step(i, x, o, noise=n)[0], expected, atol=1e-4)
    # Flow-GRPO, eq. 9: x' = x + (v + s^2 / 2t (x + (1 - t) v)) dt + s sqrt(-dt) n with s = a sqrt(t / (1 - t))
    (a, *_), (b, *_), (c, *_) = (getattr(ddim(FLOW, (500, 499), "flow", eta=0.5), key) for key in "abc")
    t, dt, scale = 0.501, -0.001, 0.5 * 2**0.5
    variance = scale**2 * t / (1 - t)
    assert a == pytest.approx(1 + variance / (2 * t) * dt, abs=1e-5)
    assert b == pytest.approx(dt + variance * (1 - t) / (2 * t) * dt, abs=1e-5)
    assert c == pytest.approx((-dt * variance) ** 0.5, rel=1e-2)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        ddim(LEVELS, (9, 4), "epsilon", eta=1.5)


def test_ddim_steps_equal_diffusers_scheduler():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        trained_betas=BETAS.tolist(), clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    scheduler.timesteps = torch.tensor(trailing_timesteps(5))
    scheduler.num_inference_steps = 5
    solver = ddim(LEVELS, trailing_timesteps(5), "v_prediction")
    x, o = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    for i, t in enumerate(solver.timesteps):
        assert torch.allclose(solver.step(i, x, o)[0], scheduler.step(o, t, x).prev_sample, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' solvers with numpy 2
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_dpmpp_2m_steps_match_diffusers(prediction, num_steps):
    from diffusers import DPMSolverMultistepScheduler

    settings = {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "trailing"}
    if prediction == "flow":  # diffusers' noise level is t / T before the shift, here it is (t + 1) / T
        settings |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1001, **settings)
        levels, timesteps = NoiseLevels.from_flow(1001, shift=3.0), trailing_timesteps(num_steps, 1000)
    else:
        scheduler = DPMSolverMultistepScheduler(trained_betas=BETAS.tolist(), prediction_type=prediction, **settings)
        levels, timesteps = LEVELS, trailing_timesteps(num_steps)
    scheduler.set_timesteps(num_steps)
    solver = dpmpp_2m(levels, timesteps, prediction)
    mixing = torch.randn(4, 4) / 2
    expected = latents = torch.randn(1, 4, 2, 2)
    previous = None
    for i in range(num_steps):

        def network(x, i=i):
            return torch.tanh(torch.einsum("ij,bjhw->bihw", mixing, x) + i / num_steps)

        expected = scheduler.step(network(expected), scheduler.timesteps[i], expected).prev_sample
        latents, previous = solver.step(i, latents, network(latents), previous)
        assert (latents - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_dpmpp_2m_starts_from_pure_noise(prediction):
    signal = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    levels = NoiseLevels(signal, 1 - signal if prediction == "flow" else (1 - signal**2).sqrt())
    solver, single = (make(levels, (3, 2, 1, 0), prediction) for make in (dpmpp_2m, ddim))
    assert solver.d[0] == solver.d[1] == solver.d[3] == 0 and solver.d[2] < 0
    for i in (0, 1, 3):
        assert (solver.a[i], solver.b[i]) == pytest.approx((single.a[i], single.b[i]))


def test_lcm_step_values():
    solver = lcm(LEVELS, (999, 499), "epsilon")
    x, o, n = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    signal, noise = math.sqrt(LEVELS.signal[999] ** 2), float(LEVELS.noise[999])
    scaled = 10 * 999
    clean = (x - noise * o) / signal
    consistent = 0.25 / (scaled**2 + 0.25) * x + scaled / math.sqrt(scaled**2 + 0.25) * clean
    assert torch.allclose(solver.step(0, x, o, noise=n)[0], LEVELS.signal[499] * consistent + LEVELS.noise[499] * n)
    assert solver.c == (float(LEVELS.noise[499]), 0.0)


def test_guide_value():
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 7.5) == 16.0


def test_from_flow_values():
    levels = NoiseLevels.from_flow(4, shift=3.0)
    # u = 1/4, 2/4, 3/4, 1 and s = 3 u / (1 + 2 u)
    assert levels.noise.tolist() == pytest.approx([0.5, 0.75, 0.9, 1]) and levels.signal[3] == 0
    solver = ddim(levels, (3, 1), "flow")  # Euler's steps: x + (s' - s) o
    assert solver.a == pytest.approx((1, 1)) and solver.b == pytest.approx((-0.25, -0.75))


def test_terminal_noise_level_of_any_number_of_steps():
    levels = NoiseLevels.from_flow(4, terminal=0.1)
    expected = {1: [1.0], 2: [1.0, 0.1], 4: [1.0, 0.7, 0.4, 0.1]}
    for num_steps, noise in expected.items():
        timesteps = sampling_timesteps("ddim", levels, num_steps)
        torch.testing.assert_close(levels.noise[list(timesteps)], torch.tensor(noise, dtype=torch.float64))
    assert len(levels) == 4 and levels.noise[:4].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert sampling_timesteps("lcm", levels, 2) == trailing_timesteps(2, 4)
    torch.testing.assert_close(levels.signal, 1 - levels.noise)
    with pytest.raises(ValueError, match="between 1 and 4"):
        sampling_timesteps("ddim", levels, 5)


def test_shift_of_a_schedule_depends_on_its_number_of_steps():
    shifts = torch.tensor([1.0, 3.0, 2.0, 1.0])
    levels = NoiseLevels.from_flow(4, shift=2.0, schedule_shifts=shifts)
    # s = shift u / (1 + (shift - 1) u)
    for num_steps, noise in {2: [1.0, 0.75], 3: [1.0, 0.8, 0.5]}.items():
        timesteps = sampling_timesteps("ddim", levels, num_steps)
        torch.testing.assert_close(levels.noise[list(timesteps)], torch.tensor(noise, dtype=torch.float64))
    assert len(levels) == 4 and levels.noise[1] == pytest.approx(2 / 3)
    terminal = NoiseLevels.from_flow(4, terminal=0.1, schedule_shifts=shifts)
    noise = terminal.noise[list(sampling_timesteps("ddim", terminal, 3))]
    torch.testing.assert_close(noise, torch.tensor([1.0, 1 - 0.2 * 0.9 / 0.5, 0.1], dtype=torch.float64))


def test_sample_timesteps_densities():
    torch.manual_seed(0)
    uniform, normal = (sample_timesteps(d, LEVELS, 20_000, torch.device("cpu")) for d in ("uniform", "logit-normal"))
    for timesteps in (uniform, normal):
        assert timesteps.dtype == torch.int64 and timesteps.min() >= 0 and timesteps.max() <= 999
        assert (timesteps < 500).float().mean().item() == pytest.approx(0.5, abs=0.02)
    # within one standard deviation of the middle: sigmoid(-1) = 0.269 to sigmoid(1) = 0.731
    fractions = [((steps >= 269) & (steps < 731)).float().mean().item() for steps in (uniform, normal)]
    assert fractions == pytest.approx([0.462, 0.683], abs=0.02)
    with pytest.raises(ValueError, match=r"'cosine'.*uniform, logit-normal"):
        sample_timesteps("cosine", LEVELS, 1, torch.device("cpu"))


def test_ddim_rejects_zero_signal_with_epsilon():
    levels = NoiseLevels.from_alphas_cumprod(torch.linspace(1, 0, 10))
    with pytest.raises(ValueError, match="v_prediction"):
        ddim(levels, (9, 4), "epsilon")
    assert ddim(levels, (9, 4), "v_prediction").b[0] < 0
    with pytest.raises(ValueError, match=r"'x0'.*epsilon, v_prediction, flow"):
        ddim(levels, (9, 4), "x0")


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_check_linear_sampling_rejects_clipping(key):
    check_linear_sampling({key: False, "beta_start": 0.1})
    with pytest.raises(ValueError, match=f"{key}=true"):
        check_linear_sampling({key: True})
