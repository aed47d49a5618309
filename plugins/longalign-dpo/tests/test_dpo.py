import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import math

import pytest
import torch
from longalign import load_config
from longalign.backbones import Backbone
from longalign.encoders import Conditioning, Encoder
from longalign.functional import NoiseLevels
from longalign.registry import ConfigError
from longalign.runtime import Runtime
from longalign.testing import check_trainer
from longalign.testing.tiny import tiny_sd
from torch import nn

from longalign_dpo.config import DPOConfig
from longalign_dpo.trainer import DPOTrainer

ALPHAS = torch.linspace(0.99, 0.05, 20, dtype=torch.float64)
LEVELS = {"epsilon": NoiseLevels.from_alphas_cumprod(ALPHAS), "flow": NoiseLevels.from_flow(20)}


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_out = nn.Linear(3, 3)

    def forward(self, latents, timesteps, states):
        shift = states.mean((1, 2)) + timesteps / 20
        return self.to_out(latents.movedim(1, -1)).movedim(-1, 1) + shift[:, None, None, None]


class TinyBackbone(Backbone):
    """Pixels are latents."""

    def latent_shape(self, height=None, width=None):
        return 3, 4, 4

    def encode_images(self, images, generator=None):
        return 2 * images - 1

    def call(self, denoiser, latents, timesteps, conditioning):
        return denoiser(latents, timesteps, conditioning.states)


class Letters(Encoder):
    dim = 2

    def encode(self, prompts):
        return Conditioning(torch.tensor([[[len(p) / 5, p.count("a") / 3]] for p in prompts]))


def build(prediction="epsilon", **keys):
    torch.manual_seed(0)
    backbone = TinyBackbone(Pointwise(), prediction, LEVELS[prediction], 4)
    config = DPOConfig(**{"lora": None, "beta": 3.0, "timesteps": "uniform", **keys})
    return DPOTrainer.from_config(config, Runtime(), backbone=backbone, encoder=Letters()).train()


def batch(preference=(1.0, 0.0, 0.75)):
    image = torch.rand(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return {"prompt": ["ab", "c", "aaa"], "image": image, "preference": torch.tensor(preference)}


def lora(**keys):
    return {"rank": 2, "dropout": 0.0, "targets": ["to_out"], **keys}


@pytest.mark.parametrize("settings", [None, lora()])
def test_loss_is_log_2_at_the_start(settings):
    trainer = build(lora=settings)
    losses = trainer.loss(batch())
    assert losses["dpo_loss"].item() == pytest.approx(math.log(2))
    assert losses["margin"] == 0 and losses["preferred_change"] == 0
    losses["dpo_loss"].backward()
    assert any(p.grad.abs().max() > 0 for p in trainer.trainable())
    for p in trainer.trainable():
        p.grad = None
    trainer.loss(batch((0.5, 0.5, 0.5)))["dpo_loss"].backward()
    assert trainer.loss(batch((0.5, 0.5, 0.5)))["accuracy"] == 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_loss_and_gradient_equal_the_formula(prediction):
    trainer, reference = build(prediction), build(prediction).backbone.denoiser
    with torch.no_grad():
        for p in trainer.trainable():
            p.add_(0.1 * torch.randn_like(p))
    data = batch((1.0, 0.0, 1.0))
    torch.manual_seed(2)
    losses = trainer.loss(data)
    losses["dpo_loss"].backward()
    got = [p.grad.clone() for p in trainer.trainable()]

    torch.manual_seed(2)
    noise, timesteps = torch.randn(3, 3, 4, 4), torch.randint(20, (3,))
    levels, model = LEVELS[prediction], trainer.backbone.denoiser
    model.zero_grad()
    terms, changes = [], []
    for i in range(3):
        t, states = timesteps[i : i + 1], trainer.encoder.encode([data["prompt"][i]]).states
        change = []
        for image in data["image"][i] if data["preference"][i] == 1 else data["image"][i].flip(0):
            clean = 2 * image[None] - 1
            noisy = float(levels.signal[t]) * clean + float(levels.noise[t]) * noise[i]
            target = noise[i] if prediction == "epsilon" else noise[i] - clean
            error = ((model(noisy, t, states) - target) ** 2).mean()
            change.append(error - ((reference(noisy, t, states) - target) ** 2).mean().detach())
        terms.append(-nn.functional.logsigmoid(-3.0 / 2 * (change[0] - change[1])))
        changes.append([c.item() for c in change])
    expected = torch.stack(terms).mean()
    expected.backward()
    torch.testing.assert_close(losses["dpo_loss"], expected)
    torch.testing.assert_close(got, [p.grad for p in trainer.trainable()])
    assert float(losses["preferred_change"]) == pytest.approx(sum(c[0] for c in changes) / 3, abs=1e-6)
    correct = sum(c[0] < c[1] for c in changes) / 3
    assert float(losses["accuracy"]) == pytest.approx(correct)


def test_soft_preference_is_a_mixture():
    trainer = build()
    with torch.no_grad():
        trainer.trainable()[0].add_(0.1)

    def loss(*preference):
        torch.manual_seed(2)
        return trainer.loss(batch(preference))["dpo_loss"].item()

    mixture = 0.75 * loss(1.0, 1.0, 1.0) + 0.25 * loss(0.0, 0.0, 0.0)
    assert loss(0.75, 0.75, 0.75) == pytest.approx(mixture, rel=1e-5)


@pytest.mark.parametrize("settings", [None, lora()])
def test_training_changes_no_reference_and_learns_the_preference(settings):
    trainer = build(lora=settings, beta=50.0)
    inputs = torch.randn(2, 3, 4, 4), torch.tensor([3, 9]), trainer.encoder.encode(["a", "b"])
    before = trainer.backbone.predict_reference(*inputs)
    optimizer = torch.optim.Adam(trainer.trainable(), 0.02)
    data, history = batch((1.0, 0.0, 1.0)), []
    for _ in range(60):
        loss = trainer.loss(data)["dpo_loss"]
        history.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(trainer.backbone.predict_reference(*inputs), before)
    assert not torch.allclose(trainer.backbone.predict(*inputs), before)
    assert sum(history[-10:]) / 10 < 0.9 * math.log(2)


def run(checkpoint, **changes):
    return {
        "backbone": {"name": "sd", "checkpoint": checkpoint},
        "encoder": {"name": "clip-segment", "checkpoint": checkpoint},
        "trainer": {"name": "dpo", "lora": {"rank": 2}},
        "data": {"name": "scene-pairs", "size": 8},
        "loop": {"batch_size": 2, "workers": 0, "lr": 1e-3},
        **changes,
    }


def test_dpo_conforms(tmp_path):
    check_trainer(run(str(tiny_sd(tmp_path / "sd"))))


def test_config_rejects_single_images_rewards_and_cached_latents():
    with pytest.raises(ConfigError, match="'dpo' needs two images per prompt"):
        load_config(run("mini/sd", data={"name": "scenes"}))
    with pytest.raises(ConfigError, match="'dpo' uses no rewards"):
        load_config(run("mini/sd", rewards=[{"name": "denscore", "checkpoint": "mini/denscore"}]))
    with pytest.raises(ConfigError, match=r"cache\.latents: .*set it to false"):
        load_config(run("mini/sd", cache={"folder": "cache"}))
    load_config(run("mini/sd", cache={"folder": "cache", "latents": False}))
