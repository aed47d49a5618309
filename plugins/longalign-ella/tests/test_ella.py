"""The encoder `ella` against a plain computation with the published weights' names, written out below."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from longalign import Model, Runtime, build_from_config, fit, load_config, override
from longalign.functional import ddim, guide, trailing_timesteps
from longalign.registry import ConfigError, encoders
from longalign.testing import check_encoder
from longalign.testing.tiny import tiny_sd, tiny_t5
from longalign.trainers import RewardConfig, RewardTrainer
from safetensors.torch import save_file
from torch.nn import functional as F

from longalign_ella.config import EllaConfig
from longalign_ella.resampler import Resampler

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[3]
BASE, EXAMPLE = "examples/mini-align.yaml", Path(__file__).parents[1] / "example.yaml"
PROMPTS = ["a red fox", "The sky is green. A fox sleeps on a wall.", ""]

#: sizes of a tiny resampler for a T5 and a UNet of width 16
SIZES = {"in_dim": 16, "width": 16, "layers": 2, "heads": 2, "queries": 5, "time_channels": 8, "time_dim": 12}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the file of a tiny random resampler, without zeros."""
    generator = torch.Generator().manual_seed(0)
    state = Resampler(**SIZES).state_dict()
    folder = tmp_path_factory.mktemp("ella")
    random = {key: 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}
    save_file(random, folder / "tiny.safetensors")
    return folder


@pytest.fixture(scope="module")
def run_config(weights, tmp_path_factory):
    """A run with tiny models: `ella` on a tiny T5, and a Stable Diffusion of 64 px."""
    adapter = {"checkpoint": str(weights), "file": "tiny.safetensors", **SIZES}
    t5 = str(tiny_t5(tmp_path_factory.mktemp("t5")))
    return {
        "backbone": {"name": "sd", "checkpoint": str(tiny_sd(tmp_path_factory.mktemp("sd")))},
        "encoder": {"name": "ella", "checkpoint": t5, "adapter": adapter, "max_tokens": 12},
    }


def resampled(state, text, timestep):
    """The states ``(queries, width)`` of one prompt's T5 states ``(n, in_dim)``, without its padding."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        shift, scale = linear(f"{name}.linear", F.silu(time)).chunk(2)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    half = SIZES["time_channels"] // 2
    angles = timestep * torch.tensor([10000 ** (-i / half) for i in range(half)]).to(text)
    time = linear("time_embedding.linear_1", torch.cat([angles.cos(), angles.sin()]))
    time = linear("time_embedding.linear_2", F.silu(time))
    x = state["connector.latents"] + linear("connector.time_aware_linear", F.silu(time))
    text = linear("connector.proj_in", text)
    for i in range(SIZES["layers"]):
        block = f"connector.perceiver_blocks.{i}"
        inputs = norm(f"{block}.ln_1", x)
        keys = torch.cat([inputs, norm(f"{block}.ln_2", text)])
        weights = state[f"{block}.attn.in_proj_weight"].chunk(3), state[f"{block}.attn.in_proj_bias"].chunk(3)
        q, k, v = (F.linear(y, w, b) for y, w, b in zip((inputs, keys, keys), *weights, strict=True))
        heads = []
        for head in range(SIZES["heads"]):
            part = slice(head * (d := SIZES["width"] // SIZES["heads"]), (head + 1) * d)
            attention = (q[:, part] @ k[:, part].T / math.sqrt(d)).softmax(-1)
            heads.append(attention @ v[:, part])
        x = x + linear(f"{block}.attn.out_proj", torch.cat(heads, dim=-1))
        hidden = F.relu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_ff", x))) ** 2
        x = x + linear(f"{block}.mlp.c_proj", hidden)
    return x


def reference_states(encoder, prompts, timesteps, **padding):
    """The states of each prompt at its timestep, each encoded alone by T5, without padding by default."""
    state = dict(encoder.adapter.named_parameters())
    rows = []
    for prompt, timestep in zip(prompts, timesteps, strict=True):
        tokens = encoder.tokens.tokenizer(prompt, return_tensors="pt", **padding)
        with torch.no_grad():
            text = encoder.model(**tokens).last_hidden_state[0]
        rows.append(resampled(state, text, timestep))
    return torch.stack(rows)


def reference_predict(backbone, encoder, latents, timesteps, prompts):
    states = reference_states(encoder, prompts, timesteps)
    return backbone.denoiser(latents, torch.tensor(timesteps), encoder_hidden_states=states, return_dict=False)[0]


def close(actual, expected, tolerance=1e-5):
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance


@pytest.fixture(scope="module")
def composition(run_config):
    return build_from_config(run_config, Runtime())


def test_encoder_conforms(run_config):
    check_encoder(run_config["encoder"])
    assert encoders.get("ella") is EllaConfig and encoders.info("ella").owner.startswith("longalign-ella 0.1")


def test_names_and_shapes_of_published_weights():
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in Resampler().state_dict().items()}
    linear = {
        "time_embedding.linear_1": (768, 320), "time_embedding.linear_2": (768, 768),
        "connector.time_aware_linear": (768, 768), "connector.proj_in": (768, 2048),
    }  # fmt: skip
    for block in (f"connector.perceiver_blocks.{i}" for i in range(6)):
        norms = {f"{block}.{norm}.linear": (1536, 768) for norm in ("ln_1", "ln_2", "ln_ff")}
        mlp = {f"{block}.mlp.c_fc": (3072, 768), f"{block}.mlp.c_proj": (768, 3072)}
        linear |= {**norms, **mlp, f"{block}.attn.out_proj": (768, 768)}
    expected = {f"{name}.weight": shape for name, shape in linear.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    for block in range(6):
        attention = f"connector.perceiver_blocks.{block}.attn.in_proj"
        expected |= {f"{attention}_weight": (2304, 768), f"{attention}_bias": (2304,)}
    assert shapes == expected | {"connector.latents": (64, 768)}
    config = encoders.validate("ella")
    assert config.widths() == (768, None) and config.adapter.checkpoint == "QQGYLab/ELLA"


def test_states_and_predictions_equal_reference(composition):
    backbone, encoder = composition.backbone, composition.encoder
    timesteps, latents = [999, 500, 0], torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        conditioning = encoder.encode(PROMPTS)
        states = conditioning.at(torch.tensor(timesteps)).states
        close(states, reference_states(encoder, PROMPTS, timesteps))
        got = backbone.predict(latents, torch.tensor(timesteps), backbone.project_text(conditioning))
        close(got, reference_predict(backbone, encoder, latents, timesteps, PROMPTS))
    assert states.shape == (3, SIZES["queries"], SIZES["width"])
    moved = conditioning[torch.tensor([2, 0])].to(dtype=torch.float64)
    close(moved.at(torch.tensor([0, 999])).states, states[[2, 0]])


@torch.no_grad()
def test_states_with_padding_masked_in_t5_only_equal_reference(run_config):
    encoder = encoders.build({**run_config["encoder"], "mask": "t5"})
    prompts, timesteps = ["a red fox", ""], [500, 0]
    states = encoder.encode(prompts).at(torch.tensor(timesteps)).states
    close(states, reference_states(encoder, prompts, timesteps, padding="max_length", max_length=12))
    without_padding = reference_states(encoder, prompts, timesteps)
    assert (states - without_padding).norm() / without_padding.norm() > 1e-3


@torch.no_grad()
def test_sampled_images_equal_reference(composition, run_config):
    backbone, encoder = composition.backbone, composition.encoder
    model = Model(composition.config, backbone, encoder, None)
    images = model(PROMPTS[:2], seeds=[3, 4], num_steps=3, guidance=2.0, solver="ddim")
    solver = ddim(backbone.noise_levels, trailing_timesteps(3), "epsilon")
    for image, prompt, seed in zip(images, PROMPTS, (3, 4), strict=False):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for i, t in enumerate(solver.timesteps):
            branches = [reference_predict(backbone, encoder, latents, [t], [text]) for text in (prompt, "")]
            latents, _ = solver.step(i, latents, guide(*branches, 2.0))
        expected = (backbone.decode(latents)[0] * 255).permute(1, 2, 0).round().numpy()
        assert np.abs(np.asarray(image).astype(float) - expected).max() <= 1


def bright(images, prompts):
    return (images * torch.linspace(0, 1, images.shape[-1]).to(images)).mean((1, 2, 3))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("keys", [{}, {"detach": False}, {"replay": "keep"}, {"replay_batch": 2}])
def test_reward_gradient_equals_autograd(double, run_config, keys):
    parts = build_from_config(run_config, Runtime())
    detach = keys.get("detach", True)
    config = RewardConfig(
        lora={"rank": 2, "dropout": 0.0}, num_steps=3, guidance=2.0, train_adapter=True,
        gradient_steps={"name": "last", "k": 2, "detach": detach}, **{k: v for k, v in keys.items() if k != "detach"},
    )  # fmt: skip
    backbone, encoder = parts.backbone.double(), parts.encoder.double()
    trainer = RewardTrainer.from_config(config, Runtime(), backbone=backbone, encoder=encoder, rewards=[bright]).train()
    prompts, parameters = PROMPTS[:2], trainer.trainable()
    assert {id(p) for p in encoder.adapter.parameters()} < {id(p) for p in parameters}

    torch.manual_seed(1)
    trainer.step({"prompt": prompts}, torch.Tensor.backward)
    got = torch.cat([p.grad.flatten() for p in parameters])

    torch.manual_seed(1)
    latents = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(trainer.solver.timesteps):
        with torch.set_grad_enabled(i > 0):
            inputs = latents.detach() if detach else latents
            branches = [reference_predict(backbone, encoder, inputs, [t] * 2, texts) for texts in (prompts, ["", ""])]
            latents, _ = trainer.solver.step(i, latents, guide(*branches, 2.0))
    loss = 0.5 * (1 - bright(backbone.decode(latents), prompts).mean())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    adapter = slice(-sum(p.numel() for p in encoder.adapter.parameters()), None)
    assert expected[adapter].norm() > 0
    close(got, expected, 1e-6)
    close(got[adapter], expected[adapter], 1e-6)


def test_cached_states_are_those_of_t5(run_config, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    config = {
        **run_config,
        "data": {"name": "prompts", "file": str(tmp_path / "prompts.txt")},
        "trainer": {"name": "reward", "resolution": 64},
        "rewards": [{"name": "clip", "checkpoint": "mini/clip"}],
        "cache": {"folder": str(tmp_path / "cache")},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "longalign", "cache", str(tmp_path / "run.yaml")], check=True)
    cached, full = (build_from_config(override(config, change), Runtime()).encoder for change in ({}, {"cache": None}))
    assert not hasattr(cached, "model")
    for prompts in (PROMPTS, PROMPTS[:1]):
        states = [encoder.encode(prompts).at(torch.full((len(prompts),), 500)).states for encoder in (cached, full)]
        close(*states)
    assert cached.adapter_parameters().keys() == full.adapter_parameters().keys()


def test_example_trains_resampler(tmp_path):
    changes = {"loop.steps": 2, "loop.batch_size": 2, "data.size": 8, "loop.warmup": 1, "output": str(tmp_path)}
    config = override(EXAMPLE, changes)
    fit(config)
    model = Model.from_pretrained(tmp_path)
    norm = model.encoder.adapter.connector.perceiver_blocks[0].ln_1.linear.weight
    assert norm.abs().max() > 0  # zero in new weights
    assert model("A red circle on the left.", num_steps=2)[0].size == (64, 64)


def test_cell_of_study_is_the_example():
    base, cells = (yaml.safe_load((ROOT / path).read_text()) for path in (BASE, "recipes/studies/encoders.yaml"))
    example = load_config(EXAMPLE)
    assert override(base, cells["cells"]["ella"]).encoder == example.encoder
    assert override(base, {"encoder": example.encoder.model_dump(), "output": example.output}) == example


def test_errors_of_config_and_weights(run_config, weights, tmp_path):
    adapter = run_config["encoder"]["adapter"]
    with pytest.raises(ValueError, match=r"(?s)tiny\.safetensors: .*'queries': 6.*connector\.latents"):
        encoders.build({**run_config["encoder"], "adapter": {**adapter, "queries": 6}})
    with pytest.raises(ConfigError, match=r"adapter: .*width 16 and 3 heads"):
        encoders.validate({**run_config["encoder"], "adapter": {**adapter, "heads": 3}})
    with pytest.raises(ConfigError, match=r"'file' and 'revision' require 'checkpoint'"):
        encoders.validate({"name": "ella", "adapter": {"file": "x.safetensors"}})
    with pytest.raises(ConfigError, match=r"adapter\.checkpoint: .*does not contain other\.safetensors"):
        Model.from_config(override(run_config, {"encoder.adapter.file": "other.safetensors"}))
    with pytest.raises(ValueError, match=r"in_dim=16\b.* got 24"):
        encoders.build({**run_config["encoder"], "adapter": {"in_dim": 24, "width": 16, "heads": 2}})
