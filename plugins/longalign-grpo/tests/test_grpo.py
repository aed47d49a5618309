import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import math

import pytest
import torch
from longalign.backbones import Backbone
from longalign.encoders import Conditioning, Encoder
from longalign.functional import NoiseLevels
from longalign.registry import ConfigError, rewards, trainers
from longalign.runtime import Runtime
from longalign.testing import check_trainer
from longalign.testing.tiny import tiny_sd
from torch import nn

from longalign_grpo.config import GRPOConfig
from longalign_grpo.policy import clipped_objective, group_advantages, step_kl, step_log_prob
from longalign_grpo.trainer import GRPOTrainer

ALPHAS = torch.linspace(0.99, 0.05, 20, dtype=torch.float64)
LEVELS = {"epsilon": NoiseLevels.from_alphas_cumprod(ALPHAS), "flow": NoiseLevels.from_flow(20, shift=2.0)}
PROMPTS = {"prompt": ["ab", "cd"]}


class Pointwise(nn.Conv2d):
    """A denoiser that adds the mean text state and the timestep to a convolution of the latents."""

    def forward(self, latents, timesteps, states):
        shift = states.mean((1, 2)) + timesteps / 20
        return super().forward(latents) + shift[:, None, None, None]


class TinyBackbone(Backbone):
    def latent_shape(self, height=None, width=None):
        return 2, 3, 3

    def decode(self, latents):
        return latents[:, [0, 1, 0]].sigmoid()

    def call(self, denoiser, latents, timesteps, conditioning):
        return denoiser(latents, timesteps, conditioning.states)


class Letters(Encoder):
    dim = 2

    def encode(self, prompts):
        return Conditioning(torch.tensor([[[len(p) / 5, p.count("a") / 3]] for p in prompts]))


def blue(images, prompts):
    """Rounded, so it has no useful gradient."""
    return (images[:, 1].mean((1, 2)) * 1e6).round() / 1e4


def build(prediction="epsilon", **keys):
    torch.manual_seed(0)
    backbone = TinyBackbone(Pointwise(2, 2, 1), prediction, LEVELS[prediction], 8)
    keys = {"lora": None, "num_steps": 4, "guidance": 2.0, "group_size": 3, **keys}
    parts = {"backbone": backbone, "encoder": Letters(), "rewards": [blue]}
    return GRPOTrainer.from_config(GRPOConfig(**keys), Runtime(), **parts).to(torch.get_default_dtype()).train()


def gradient(trainer, seed=1):
    torch.manual_seed(seed)
    losses = trainer.step(PROMPTS, torch.Tensor.backward)
    found = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    for p in trainer.trainable():
        p.grad = None
    return found, losses


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def predicted(prediction, levels, t, latents, output):
    """The predicted image and noise."""
    signal, noise = float(levels.signal[t]), float(levels.noise[t])
    if prediction == "flow":
        return latents - noise * output, latents + signal * output
    return (latents - noise * output) / signal, output


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_one_update_has_the_plain_policy_gradient(prediction):
    """The reference: autograd of advantage times log-probability over the trajectories, with torch's Normal."""
    trainer = build(prediction, denoise_batch=4)
    got, losses = gradient(trainer)

    torch.manual_seed(1)
    levels, states = LEVELS[prediction], trainer.encoder.encode(["ab"] * 3 + ["cd"] * 3).states
    empty = trainer.encoder.encode([""] * 6).states
    latents = torch.randn(6, 2, 3, 3)
    fresh = [[torch.randn(n, 2, 3, 3) for _ in range(3)] for n in (4, 2)]  # chunk by chunk
    log_prob, timesteps = torch.zeros(6), (19, 14, 9, 4)
    for i, t in enumerate(timesteps):
        outputs = [trainer.backbone.denoiser(latents, torch.full((6,), t), s) for s in (states, empty)]
        output = outputs[1] + 2.0 * (outputs[0] - outputs[1])
        image, noise = predicted(prediction, levels, t, latents, output)
        if i == 3:
            latents = image.detach()
            break
        signal_after, noise_after = (float(x[timesteps[i + 1]]) for x in (levels.signal, levels.noise))
        ratio = noise_after / signal_after * float(levels.signal[t] / levels.noise[t])
        std = noise_after * math.sqrt(1 - ratio**2)
        step = torch.distributions.Normal(signal_after * image + math.sqrt(noise_after**2 - std**2) * noise, std)
        latents = (step.mean + std * torch.cat([chunk[i] for chunk in fresh])).detach()
        log_prob = log_prob + step.log_prob(latents).mean((1, 2, 3)) / 3
    scores = blue(trainer.backbone.decode(latents), None).view(2, 3)
    advantages = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    trainer.backbone.denoiser.zero_grad()
    (-(advantages.flatten() * log_prob).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert float(losses["reward"]) == pytest.approx(float(scores.mean()), rel=1e-6)
    assert losses["clip_fraction"] == 0 and abs(losses["policy_loss"]) < 1e-6


def test_second_update_uses_the_ratio_and_the_clip():
    results = {}
    for clip_range in (100.0, 1e-9):
        trainer = build(updates=3, clip_range=clip_range)
        first, _ = gradient(trainer)
        with torch.no_grad():
            for p in trainer.trainable():
                p.sub_(0.1)
        second, losses = gradient(trainer)
        assert "reward" not in losses and not trainer.trajectories.is_empty()
        gradient(trainer)
        assert trainer.trajectories.is_empty()
        results[clip_range] = first, second, losses
    assert torch.equal(results[100.0][0], results[1e-9][0])
    assert results[100.0][2]["clip_fraction"] == 0 and results[1e-9][2]["clip_fraction"] == 1
    assert not torch.allclose(results[100.0][1], results[1e-9][1], rtol=1e-2)


def test_clipped_objective_stops_the_gradient_beyond_the_range():
    ratio = torch.tensor([0.5, 0.95, 1.0, 1.5, 0.5, 1.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 2.0, 1.0, -1.0, -1.0])
    objective = clipped_objective(ratio, advantages, 0.1)
    assert objective.tolist() == pytest.approx([0.5, 0.95, 2.0, 1.1, -0.9, -1.5])
    objective.sum().backward()
    assert ratio.grad.tolist() == pytest.approx([1.0, 1.0, 2.0, 0.0, 0.0, -1.0])


def test_log_probs_and_kl_equal_torch_distributions():
    after, mean, reference = torch.randn(3, 2, 4, 2, 2).unbind(0)
    normal, other = (torch.distributions.Normal(m, 0.3) for m in (mean, reference))
    torch.testing.assert_close(step_log_prob(after, mean, 0.3), normal.log_prob(after).mean((1, 2, 3)))
    divergence = torch.distributions.kl_divergence(normal, other).mean((1, 2, 3))
    torch.testing.assert_close(step_kl(mean, reference, 0.3), divergence)


def test_advantages_are_relative_to_the_group():
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    assert group_advantages(scores, 3, 5.0).tolist() == pytest.approx([-1, 0, 1, 0, 0, 0], abs=1e-5)
    assert group_advantages(scores, 3, 0.5).tolist() == pytest.approx([-0.5, 0, 0.5, 0, 0, 0], abs=1e-5)


def test_kl_pulls_to_the_reference_model():
    torch.set_default_dtype(torch.float32)  # that of the copy of the weights
    trainer, free = build(kl_weight=10.0, train_steps=2), build(train_steps=2)
    assert gradient(trainer)[1]["kl_loss"] == 0
    for t in (trainer, free):
        with torch.no_grad():
            t.backbone.denoiser.bias.add_(0.5)
    (pulled, losses), (other, _) = gradient(trainer), gradient(free)
    assert losses["kl_loss"] > 0
    # the bias is increased, so the divergence increases with it
    assert (pulled - other)[-2:].min() > 0


def test_reward_increases():
    trainer = build(group_size=16, eta=0.7)
    optimizer = torch.optim.Adam(trainer.trainable(), 0.02)
    history = []
    for i in range(25):
        torch.manual_seed(i)
        history.append(float(trainer.step(PROMPTS, torch.Tensor.backward)["reward"]))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 5


def test_grpo_conforms_if_resumed_between_updates(tmp_path):
    torch.set_default_dtype(torch.float32)
    checkpoint = str(tiny_sd(tmp_path / "sd"))
    rewards.register("blue", blue)
    trainer = {"name": "grpo", "lora": {"rank": 2, "dropout": 0}, "num_steps": 3, "group_size": 2, "clip_range": 0.1}
    try:
        check_trainer(
            {
                "backbone": {"name": "sd", "checkpoint": checkpoint},
                "encoder": {"name": "clip-segment", "checkpoint": checkpoint},
                "rewards": ["blue"],
                "trainer": {**trainer, "updates": 3, "kl_weight": 0.1},
                "data": {"name": "scenes", "size": 8},
                "loop": {"batch_size": 2, "workers": 0, "lr": 1e-2},
            }
        )
    finally:
        rewards.unregister("blue")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora": {"dropout": 0.1}}, "lora.dropout is 0.1"),
        ({"num_steps": 4, "train_steps": 4}, "at most 3"),
        ({"eta": 0}, "greater than 0"),
    ],
)
def test_config_rejects(keys, message):
    with pytest.raises(ConfigError, match=message):
        trainers.validate({"name": "grpo", **keys})


def test_samples_have_the_configured_size():
    assert build(resolution="16x8").shape[1:] == build().backbone.latent_shape(8, 16)[1:]
    assert GRPOConfig(resolution="16x8").image_sizes == {"resolution": [(8, 16)]}


def test_several_updates_need_one_process():
    config = GRPOConfig(updates=2)
    with pytest.raises(ValueError, match=r"trainer\.updates is 2"):
        GRPOTrainer.from_config(config, Runtime(world_size=2), backbone=None, encoder=None, rewards=[blue])
