"""The library on a GPU; run by ``benchmarks/gpu.sh``. With GPU_SMOKE=1 the same tests run on the CPU."""

import os
import shutil

import pytest
import torch
from torch import nn

from longalign import fit, load_config, override
from longalign.backbones.config import LoraConfig
from longalign.checkpoints.checkpoint import load_weights
from longalign.encoders.base import Conditioning
from longalign.functional.rollout_gradient import replay_backward, rollout
from longalign.functional.solvers import ddim, dpmpp_2m, trailing_timesteps
from longalign.inference.sampling import sample
from longalign.registry import backbones, encoders, rewards
from longalign.runtime import Runtime, examples_folder
from longalign.testing.tiny import tiny_sd3, tiny_sdxl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP_SEGMENT = {"name": "clip-segment", "checkpoint": "mini/sd"}
DENSCORE = {"name": "denscore", "checkpoint": "mini/denscore"}
PROMPTS = ["A red circle is at the top. It is large.", "On the left there is a small blue square."]
# relative error of bf16's and fp16's mantissas, with room for some layers
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 1e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not os.environ.get("GPU_SMOKE"), reason="no GPU; GPU_SMOKE=1 uses the CPU"),
]


@pytest.fixture(autouse=True)
def deterministic():
    """Deterministic kernels without TF32, so that equal runs give equal bits."""
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(got, expected):
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


def on_device(part):
    return {p.device.type for p in [*part.parameters(), *part.buffers()]} <= {DEVICE}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "config",
    [
        CLIP_SEGMENT,
        {"name": "clip-truncate", "checkpoint": "mini/sd"},
        {"name": "t5", "checkpoint": "mini/t5"},
        {"name": "longclip", "checkpoint": "mini/longclip"},
    ],
    ids=lambda config: config["name"],
)
@pytest.mark.filterwarnings("ignore:.*truncated")
def test_encode_on_device(config, dtype):
    encoder = encoders.build(config, Runtime(DEVICE, dtype))
    assert on_device(encoder)
    states = encoder.encode(PROMPTS).states
    assert states.device.type == DEVICE and states.dtype == getattr(torch, dtype)
    assert relative_error(states, encoders.build(config).encode(PROMPTS).states) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "config",
    [
        {"name": "clip", "checkpoint": "mini/clip"},
        {"name": "hpsv2", "checkpoint": "mini/hpsv2"},
        {"name": "pickscore", "checkpoint": "mini/pickscore"},
        {"name": "reweighted", "omega": 0.3, "direction": "batch", "inner": DENSCORE},
        {"name": "sum", "terms": [{"reward": DENSCORE, "weight": 0.5}]},
    ],
    ids=lambda config: config["name"],
)
def test_score_on_device(config, dtype):
    images = torch.rand(2, 3, 64, 64)
    scores, gradients = [], []
    for runtime in (Runtime(DEVICE, dtype), Runtime()):
        reward = rewards.build(config, runtime)
        assert runtime.device != DEVICE or on_device(reward)
        inputs = images.to(runtime.device).requires_grad_()
        scores.append(reward.score(inputs, PROMPTS).detach())
        reward.score(inputs, PROMPTS).sum().backward()
        gradients.append(inputs.grad)
    assert scores[0].device.type == gradients[0].device.type == DEVICE
    assert float((scores[0].cpu() - scores[1]).abs().max()) < TOLERANCE[dtype]
    assert relative_error(*gradients) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_sample_on_device(name, dtype, tmp_path):
    builders = {"sdxl": tiny_sdxl, "sd3": tiny_sd3}
    checkpoint = str(builders[name](tmp_path)) if name in builders else "mini/sd"
    kind = {"sd": {"name": "clip-segment"}, "sdxl": {"name": "clip-segment-sdxl"}}.get(
        name, {"name": "clip-segment-sd3", "width": 32}
    )
    encoder = encoders.build({**kind, "checkpoint": checkpoint}, Runtime(DEVICE, dtype))
    backbone = backbones.build({"name": name, "checkpoint": checkpoint}, Runtime(DEVICE, dtype))
    assert on_device(backbone)
    images = sample(backbone, encoder, PROMPTS, seeds=[0, 1], num_steps=2)
    assert images.shape[:2] == (2, 3) and images.isfinite().all()


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("solver", [ddim, dpmpp_2m])
def test_replay_backward_equals_autograd(solver, detach):
    """With dropout, whose random numbers come from the device's generator."""
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(16, 4, 3, padding=1))
    network = nn.Sequential(*convolutions).to(DEVICE, torch.float64)
    levels = backbones.build({"name": "sd", "checkpoint": "mini/sd"}).noise_levels
    solver, chosen = solver(levels, trailing_timesteps(6), "epsilon"), (1, 2, 5)
    noise = torch.randn(2, 4, 8, 8).to(DEVICE, torch.float64)

    def predict(latents, timesteps):
        return network(latents) * (1 + timesteps.view(-1, 1, 1, 1) / 1000)

    def loss(latents):
        return latents.tanh().sum()

    torch.manual_seed(1)
    final, recorded = rollout(predict, noise, solver, chosen)
    (gradient,) = torch.autograd.grad(loss(final.requires_grad_()), final)
    for *_, scalar in replay_backward(predict, solver, recorded, gradient, detach):
        scalar.backward()
    replayed = torch.cat([p.grad.flatten() for p in network.parameters()])

    network.zero_grad()
    torch.manual_seed(1)
    latents, previous = noise, None
    for index, timestep in enumerate(solver.timesteps):
        with torch.set_grad_enabled(index in chosen):
            inputs = latents.detach() if detach else latents
            output = predict(inputs, torch.full((len(noise),), timestep, device=DEVICE))
        latents, previous = solver.step(index, latents, output, previous)
    loss(latents).backward()
    assert relative_error(replayed, torch.cat([p.grad.flatten() for p in network.parameters()])) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True])
def test_sampling_with_merged_lora_and_projected_text_equals_plain_calls(graphs):
    if graphs and DEVICE == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    backbone = backbones.build({"name": "sd", "checkpoint": "mini/sd"}, Runtime(DEVICE))
    for parameter in backbone.add_lora(LoraConfig(rank=4, dropout=0.0), "x"):
        nn.init.normal_(parameter, std=0.02)
    if graphs:
        backbone.use_cuda_graphs()
    width = backbone.denoiser.config.cross_attention_dim
    rows, timesteps = torch.tensor([0, 1, 2, 2], device=DEVICE), torch.full((4,), 500, device=DEVICE)
    for _ in range(2):
        conditioning = Conditioning(torch.randn(3, 77, width, device=DEVICE))
        latents = torch.randn(4, *backbone.latent_shape(), device=DEVICE)
        expected = backbone.predict(latents, timesteps, conditioning[rows])
        with backbone.merged_lora():
            projected = backbone.project_text(conditioning)[rows]
            for _ in range(2):
                assert relative_error(backbone.predict(latents, timesteps, projected), expected) < 1e-4
        for parameter in backbone.denoiser.parameters():
            parameter.mul_(1.01)


def run(name, output, resume=None, **changes):
    """Runs a few steps of an example; returns its result and its LoRA's weights."""
    defaults = {"loop.steps": 2, "loop.batch_size": 4, "output": str(output), "trainer.lora.dropout": 0.1}
    if name == "mini-reward":
        defaults |= {"init_from": None, "trainer.num_steps": 4, "trainer.replay_batch": 1}
    config = override(load_config(examples_folder() / f"{name}.yaml"), {**defaults, **changes})
    result = fit(config, device=DEVICE, resume=resume)
    return result, load_weights(result.checkpoint).loras[-1].state


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["mini-align", "mini-reward"])
def test_fit_precision(name, precision, tmp_path):
    if precision == "fp16" and DEVICE == "cpu":
        pytest.skip("fp16 training needs a GPU")
    result, weights = run(name, tmp_path, **{"loop.precision": precision})
    assert result.step == 2
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.abs().max() > 0 for key, tensor in weights.items() if "lora_B" in key)


@pytest.mark.parametrize("name", ["mini-align", "mini-reward"])
def test_resume_equals_uninterrupted_run(name, tmp_path):
    four = {"loop.steps": 4, "loop.save_every": 2, "loop.keep": None}
    whole, weights = run(name, tmp_path, **four)
    shutil.rmtree(whole.checkpoint)
    _, resumed = run(name, tmp_path, resume=tmp_path, **four)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in weights.items())


@pytest.mark.skipif(DEVICE == "cpu", reason="compiles for the GPU")
def test_fit_compiled_equals_eager(tmp_path):
    _, eager = run("mini-align", tmp_path / "eager", **{"trainer.lora.dropout": 0.0})
    _, compiled = run("mini-align", tmp_path / "compiled", **{"trainer.lora.dropout": 0.0, "loop.compile": True})
    down = [key for key in eager if "lora_A" in key]
    assert max(relative_error(compiled[key], eager[key]) for key in down) < 1e-2
