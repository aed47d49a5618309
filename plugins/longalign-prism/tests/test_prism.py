"""The encoder `prism` against a plain computation with one call of the denoiser for each part."""

import os
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

from longalign_prism.config import PrismConfig

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[3]
EXAMPLE = Path(__file__).parents[1] / "example.yaml"
PROMPTS = ["A red fox sleeps. The sky is green. A wall.", "a red fox"]
PARTS = [["A red fox sleeps.", "The sky is green.", "A wall."], ["a red fox"]]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """A run with a Stable Diffusion of 64 px, and `prism` on a tiny T5 with an adapter, one sentence per part."""
    t5 = str(tiny_t5(tmp_path_factory.mktemp("t5")))
    adapter = {"in_dim": 16, "int_dim": 8, "out_dim": 16}
    inner = {"name": "t5", "checkpoint": t5, "max_tokens": 12, "mask": True, "adapter": adapter}
    return {
        "backbone": {"name": "sd", "checkpoint": str(tiny_sd(tmp_path_factory.mktemp("sd")))},
        "encoder": {"name": "prism", "inner": inner, "segmenter": "sentence"},
    }


@pytest.fixture(scope="module")
def composition(run_config):
    parts = build_from_config(run_config, Runtime())
    parts.encoder.eval()  # the adapter has dropout
    return parts


def reference_predict(backbone, encoder, latents, timesteps, parts):
    """The mean of the predictions for the parts of each prompt, in one call for each part."""
    rows = []
    for row, (texts, timestep) in enumerate(zip(parts, timesteps, strict=True)):
        inputs = latents[row : row + 1], torch.tensor([timestep])
        rows.append(sum(backbone.predict(*inputs, encoder.inner.encode([text])) for text in texts) / len(texts))
    return torch.cat(rows)


def close(actual, expected, tolerance=1e-5):
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance


def test_encoder_conforms(run_config):
    check_encoder(run_config["encoder"])
    truncating = {"name": "clip-truncate", "checkpoint": run_config["backbone"]["checkpoint"]}
    check_encoder({"name": "prism", "inner": truncating, "segmenter": {"name": "packed", "n": 20}})
    assert encoders.get("prism") is PrismConfig and encoders.info("prism").owner.startswith("longalign-prism 0.1")


@torch.no_grad()
def test_prediction_is_mean_over_parts(composition):
    backbone, encoder = composition.backbone, composition.encoder
    latents, timesteps = torch.randn(2, 4, 8, 8), [999, 20]
    conditioning = backbone.project_text(encoder.encode(PROMPTS))
    assert conditioning.counts == (3, 1)
    assert [report.segments for report in conditioning.reports] == [tuple(texts) for texts in PARTS]
    expected = reference_predict(backbone, encoder, latents, timesteps, PARTS)
    close(backbone.predict(latents, torch.tensor(timesteps), conditioning), expected)
    close(backbone.predict(latents.flip(0), torch.tensor(timesteps[::-1]), conditioning[torch.tensor([1, 0])]).flip(0),
          expected)  # fmt: skip
    close(backbone.predict(latents[1:], torch.tensor([20]), conditioning[1:].to(dtype=torch.float32)), expected[1:])


def test_parts_are_packed_by_tokens_of_inner_encoder(composition):
    encoder = encoders.build({"name": "prism", "inner": {"name": "clip-truncate", "checkpoint": "mini/sd"}})
    assert encoder.count_tokens("red " * 200) == 200  # beyond the window of 75 tokens
    long = "The red circle is left of the blue square. " * 20
    conditioning = encoder.encode([long, ""])
    assert conditioning.counts[0] > 2 and conditioning.counts[1] == 1
    assert not conditioning.reports[0].truncated and sum(conditioning.reports[0].tokens) > 150


@torch.no_grad()
def test_sampled_images_equal_reference(composition):
    backbone, encoder = composition.backbone, composition.encoder
    images = Model(composition.config, backbone, encoder, None)(
        PROMPTS, seeds=[3, 4], num_steps=3, guidance=2.0, solver="ddim"
    )
    solver = ddim(backbone.noise_levels, trailing_timesteps(3), "epsilon")
    for image, texts, seed in zip(images, PARTS, (3, 4), strict=True):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for i, t in enumerate(solver.timesteps):
            branches = [reference_predict(backbone, encoder, latents, [t], [parts]) for parts in (texts, [""])]
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


@pytest.mark.parametrize("detach", [True, False])
def test_reward_gradient_equals_autograd(double, run_config, detach):
    parts = build_from_config(run_config, Runtime())
    config = RewardConfig(
        lora={"rank": 2, "dropout": 0.0}, num_steps=3, guidance=2.0, train_adapter=True,
        gradient_steps={"name": "last", "k": 2, "detach": detach},
    )  # fmt: skip
    backbone, encoder = parts.backbone.double(), parts.encoder.double()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = RewardTrainer.from_config(config, Runtime(), backbone=backbone, encoder=encoder, rewards=[bright]).train()
    parameters = trainer.trainable()

    torch.manual_seed(1)
    trainer.step({"prompt": PROMPTS}, torch.Tensor.backward)
    got = torch.cat([p.grad.flatten() for p in parameters])

    torch.manual_seed(1)
    latents = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(trainer.solver.timesteps):
        with torch.set_grad_enabled(i > 0):
            inputs = latents.detach() if detach else latents
            branches = [reference_predict(backbone, encoder, inputs, [t] * 2, texts) for texts in (PARTS, [[""]] * 2)]
            latents, _ = trainer.solver.step(i, latents, guide(*branches, 2.0))
    loss = 0.5 * (1 - bright(backbone.decode(latents), PROMPTS).mean())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    adapter = slice(-sum(p.numel() for p in encoder.inner.adapter.parameters()), None)
    close(got, expected, 1e-6)
    close(got[adapter], expected[adapter], 1e-6)


def test_example_trains(tmp_path):
    changes = {"loop.steps": 2, "loop.batch_size": 1, "loop.warmup": 1, "data.size": 8, "data.words": [400, 480]}
    fit(override(EXAMPLE, {**changes, "output": str(tmp_path)}))
    model = Model.from_pretrained(tmp_path)
    prompt = "The red circle is left of the blue square. " * 60
    assert model.encoder.count_tokens(prompt) > 500
    assert model(prompt, num_steps=1)[0].size == (64, 64)


def test_cells_of_study():
    base, cells = (
        yaml.safe_load((ROOT / path).read_text())
        for path in ("examples/mini-align.yaml", "recipes/studies/composition.yaml")
    )
    configs = {name: override(base, changes).encoder for name, changes in cells["cells"].items()}
    assert configs["prism, parts of 40 tokens"] == load_config(EXAMPLE).encoder
    assert all(config.check_files() == [] for config in configs.values())


def test_errors(run_config, tmp_path):
    prism = run_config["encoder"]
    cached = {**run_config, "cache": {"folder": str(tmp_path)}, "data": {"name": "scenes"}}
    with pytest.raises(ConfigError, match=r"cache\.prompts: .*'prism' cannot be cached"):
        load_config(cached)
    joined = encoders.build({"name": "concat", "parts": [prism, prism]})
    with pytest.raises(ValueError, match=r"several predictions.*inner encoder"):
        joined.encode(PROMPTS)
