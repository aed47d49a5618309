"""Consistency distillation and reward fine-tuning of distilled models: target, gradient, teacher, checkpoints."""

import math

import pytest
import torch
from worlds import Squares, ToyEncoder, red

from longalign.backbones.config import LoraConfig
from longalign.checkpoints.checkpoint import load_for_sampling, load_weights
from longalign.compose import build_from_config
from longalign.errors import ConfigError
from longalign.functional.diffusion import add_noise, training_target
from longalign.inference.sampling import sample
from longalign.loop.batches import collate
from longalign.loop.fit import fit
from longalign.registry import trainers
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone
from longalign.trainers.lcm.config import LCMConfig
from longalign.trainers.lcm.trainer import LCMTrainer
from longalign.trainers.reward.config import LCMRewardConfig

BATCH = collate([Squares()[i] for i in (1, 5, 7)])
NO_DROPOUT = LoraConfig(rank=2, dropout=0.0)
PREDICTIONS = ("epsilon", "v_prediction")


def aligned(prediction="epsilon"):
    """A backbone with the unmerged LoRA of an earlier stage, as ``init_from`` loads it."""
    backbone = tiny_backbone(prediction)
    move(backbone.add_lora(NO_DROPOUT, "align"))
    backbone.denoiser.requires_grad_(False)
    return backbone


def move(parameters, std=0.3):
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.add_(std * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def build(prediction="epsilon", lora=NO_DROPOUT, moved=True, **keys):
    torch.manual_seed(0)
    parts = {"backbone": aligned(prediction), "encoder": ToyEncoder()}
    trainer = LCMTrainer.from_config(LCMConfig(lora=lora, **keys), Runtime(), **parts)
    if moved:
        move(trainer.trainable(), 0.3 if lora else 0.01)
    return trainer.train()


def scalings(t):
    """c_skip and c_out by the papers' formulas, with timestep scaling 10 and sigma_data 0.5."""
    return 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)


def both(prediction, alpha, x, output):
    """The image and the noise that an output predicts."""
    signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction == "epsilon":
        return (x - sigma * output) / signal, output
    return signal * x - sigma * output, sigma * x + signal * output


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_consistency_function_matches_paper(prediction):
    trainer = build(prediction)
    levels = trainer.backbone.noise_levels
    image, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    timesteps = torch.tensor([0, 1, 999])
    noisy = add_noise(levels, image, noise, timesteps)
    # a perfect prediction gives the image, except at the boundary, where the function returns its input
    perfect = training_target(prediction, levels, image, noise, timesteps)
    value = trainer.consistency(timesteps, noisy, perfect)
    assert torch.equal(value[0], noisy[0])
    for i, t in ((1, 1), (2, 999)):
        skip, out = scalings(t)
        torch.testing.assert_close(value[i], skip * noisy[i] + out * image[i], atol=2e-5, rtol=1e-4)
    assert scalings(1)[0] == pytest.approx(0.0024938, rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("start", [999, 519, 13])
def test_target_is_student_value_after_guided_teacher_step(prediction, start):
    trainer, teacher = build(prediction), aligned(prediction)
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    conditioning, empty = (trainer.encoder.eval().encode(prompts) for prompts in (["ab", "cd"], [""] * 2))
    scale = torch.tensor([7.5, 2.0]).view(2, 1, 1, 1)
    alphas = trainer.backbone.noise_levels.signal.square().tolist()

    timesteps, end = torch.full((2,), start), max(start - 20, 0)
    cond = both(prediction, alphas[start], noisy, teacher.predict(noisy, timesteps, conditioning))
    uncond = both(prediction, alphas[start], noisy, teacher.predict(noisy, timesteps, empty))
    image, noise = (u + scale * (c - u) for c, u in zip(cond, uncond, strict=True))
    earlier = math.sqrt(alphas[end]) * image + math.sqrt(1 - alphas[end]) * noise
    output = trainer.backbone.predict(earlier, torch.full((2,), end), conditioning)
    skip, out = scalings(end)
    expected = skip * earlier + out * both(prediction, alphas[end], earlier, output)[0]

    target = trainer.target(noisy, timesteps, trainer.encode(["ab", "cd", ""]), scale)
    assert not target.requires_grad
    torch.testing.assert_close(target, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("huber_c", [0.001, 0.5, None])
def test_consistency_loss_compares_student_with_target(huber_c, monkeypatch):
    trainer, calls = build(huber_c=huber_c, w_min=2.0, w_max=5.0), []
    target = trainer.target
    monkeypatch.setattr(trainer, "target", lambda *args: calls.append((*args, target(*args))) or calls[-1][-1])
    torch.manual_seed(3)
    loss = trainer.loss(BATCH)["consistency_loss"]
    noisy, start, conditioning, guidance, expected = calls[0]
    assert len(conditioning.states) == 4 and torch.equal(conditioning.states[3:], trainer.encode([""]).states)
    assert guidance.shape == (3, 1, 1, 1) and guidance.unique().numel() == 3
    assert guidance.min() >= 3.0 and guidance.max() <= 6.0
    errors = trainer.consistency(start, noisy, trainer.backbone.predict(noisy, start, conditioning[:3])) - expected
    values = [e**2 if huber_c is None else math.sqrt(e**2 + huber_c**2) - huber_c for e in errors.flatten().tolist()]
    assert loss.item() == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_start_timesteps_all_and_ddim():
    assert build().starts.tolist() == list(range(10, 1000))
    assert build(start_timesteps="ddim").starts.tolist() == list(range(19, 1000, 20))
    assert build(start_timesteps="ddim", num_ddim_timesteps=4).starts.tolist() == [249, 499, 749, 999]
    assert build(num_ddim_timesteps=1000).starts.tolist() == list(range(1, 1000))


@pytest.mark.parametrize("lora", [LoraConfig(rank=2, dropout=0.1), None])
def test_step_gradient_reaches_only_student_and_teacher_is_frozen(lora):
    trainer, teacher = build(lora=lora, moved=False), aligned()
    assert not trainer.encoder.adapter[1].training and trainer.backbone.denoiser.training
    optimizer = torch.optim.SGD(trainer.trainable(), lr=0.1)
    losses = {}
    for _ in range(2):
        losses = trainer.step(BATCH, torch.Tensor.backward)
        optimizer.step()
    assert set(losses) == {"consistency_loss"} and not losses["consistency_loss"].requires_grad
    graded = {n for n, p in trainer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    if lora is None:
        assert graded == {f"backbone.denoiser.{n}" for n, _ in trainer.backbone.denoiser.named_parameters()}
    else:
        expected = {n for n, _ in trainer.named_parameters() if ".lora_" in n}
        assert graded == expected and len(trainer.trainable()) == len(expected)
        assert trainer.backbone.lora_names == ["align", "lcm"]
    noisy, timesteps = torch.randn(3, 4, 4, 4), torch.tensor([19, 519, 999])
    conditioning = trainer.encode(BATCH["prompt"])
    before, after = (
        teacher.predict(noisy, timesteps, conditioning),
        trainer.backbone.predict(noisy, timesteps, conditioning),
    )
    torch.testing.assert_close(
        trainer.backbone.predict_reference(noisy, timesteps, conditioning), before, atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(after, before, atol=1e-4)
    assert trainer.backbone.denoiser.training  # also after the target, which is computed without dropout


def test_target_is_computed_without_dropout():
    trainer = build(lora=LoraConfig(rank=2, dropout=0.5))
    inputs = torch.randn(3, 4, 4, 4), torch.tensor([19, 519, 999]), trainer.encode([*BATCH["prompt"], ""])
    first, second = (trainer.target(*inputs, torch.ones(3, 1, 1, 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(*(trainer.backbone.predict(*inputs[:2], inputs[2][:3]) for _ in range(2)))


@pytest.mark.parametrize("lora", [NO_DROPOUT, None])
def test_ema_decay_computes_target_from_moving_average(lora):
    trainer, plain = build(lora=lora, moved=False, ema_decay=0.75), build(lora=lora, moved=False)
    inputs = torch.randn(3, 4, 4, 4), torch.tensor([19, 519, 999]), trainer.encode([*BATCH["prompt"], ""])
    scales = torch.full((3, 1, 1, 1), 3.0)
    start = plain.target(*inputs, scales)
    torch.testing.assert_close(trainer.target(*inputs, scales), start)
    before = [p.detach().clone() for p in trainer.trainable()]
    move(trainer.trainable(), 0.1)
    torch.testing.assert_close(trainer.target(*inputs, scales), start)  # the average is not updated yet
    trainer.on_optimizer_step()
    for average, old, new in zip(trainer.averages(), before, trainer.trainable(), strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new.detach())
    updated = trainer.target(*inputs, scales)
    assert not torch.allclose(updated, start, atol=1e-4)
    with torch.no_grad():
        for parameter, average in zip(plain.trainable(), trainer.averages(), strict=True):
            parameter.copy_(average)
    torch.testing.assert_close(plain.target(*inputs, scales), updated)
    assert not list(plain.buffers(recurse=False)) and plain.on_optimizer_step() is None


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_reduces_loss(prediction):
    trainer = build(prediction, moved=False, huber_c=None, w_min=1.0, w_max=2.0)
    optimizer = torch.optim.Adam(trainer.trainable(), lr=1e-2)

    def held_out():
        torch.manual_seed(99)
        with torch.no_grad():
            return trainer.loss(collate([Squares()[i % 10] for i in range(32)]))["consistency_loss"].item()

    before = held_out()
    torch.manual_seed(4)
    for _ in range(12):
        trainer.step(BATCH, torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert held_out() < 0.8 * before


# Runs


def distil_config(world, output, start, **trainer):
    config = world.align_config(output, steps=2, save_every=1)
    settings = {"name": "lcm", "lora": {"rank": 2}, "ema_decay": 0.5, **trainer}
    return {**config, "trainer": settings, "init_from": str(start), "loop": {**config["loop"], "accumulation": 2}}


@pytest.fixture
def runs(world, tmp_path):
    """Checkpoints of an align run and of a distillation that starts from it."""
    start = fit(world.align_config(tmp_path / "align", steps=2)).checkpoint
    return start, fit(distil_config(world, tmp_path / "lcm", start)).checkpoint


def test_fit_from_align_checkpoint_samples_in_four_steps(world, runs, tmp_path):
    start, distilled = runs
    one, two = load_weights(start), load_weights(distilled)
    assert [lora.name for lora in two.loras] == ["align", "lcm"]
    assert all(torch.equal(two.loras[0].state[k], v) for k, v in one.loras[0].state.items())
    assert any(v.abs().sum() > 0 for k, v in two.loras[1].state.items() if ".lora_B." in k)
    assert one.adapter and all(torch.equal(two.adapter[k], v) for k, v in one.adapter.items())

    _, backbone, encoder = load_for_sampling(distilled, Runtime())
    images = sample(backbone, encoder, ["ab", "cd"], seeds=[0, 1], solver="lcm", num_steps=4, guidance=1.0)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    _, earlier, _ = load_for_sampling(start, Runtime())
    assert not torch.equal(images, sample(earlier, encoder, ["ab", "cd"], seeds=[0, 1], solver="lcm", num_steps=4))

    config = {**world.reward_config(tmp_path / "reward", steps=1), "init_from": str(distilled)}
    config["trainer"] = {"name": "lcm-reward", "lora": {"rank": 2}}
    rewarded = load_weights(fit(config).checkpoint)
    assert [lora.name for lora in rewarded.loras] == ["align", "lcm", "reward"]


def test_resume_with_ema_decay_equals_uninterrupted(world, runs, tmp_path):
    start, uninterrupted = runs
    config = distil_config(world, tmp_path / "cut", start)
    fit({**config, "loop": {**config["loop"], "steps": 1}})
    resumed = fit(config, resume=tmp_path / "cut").checkpoint
    one, two = (torch.load(c / "resume" / "shared.pt", weights_only=True) for c in (uninterrupted, resumed))
    assert one["buffers"] and one["buffers"].keys() == two["buffers"].keys()
    assert all(torch.equal(one["buffers"][k], two["buffers"][k]) for k in one["buffers"])
    assert all(torch.equal(p, q) for p, q in zip(one["parameters"], two["parameters"], strict=True))
    # the average was updated by half at each optimizer step
    assert any(not torch.equal(p, b) for p, b in zip(one["parameters"], one["buffers"].values(), strict=True))


# Reward fine-tuning of the distilled model


def test_lcm_reward_trains_four_steps_without_guidance():
    config = trainers.validate("lcm-reward")
    assert isinstance(config, LCMRewardConfig)
    torch.manual_seed(0)
    config = LCMRewardConfig(lora=NO_DROPOUT)
    trainer = config.build(Runtime(), backbone=aligned(), encoder=ToyEncoder(), rewards=[red]).train()
    move(trainer.trainable())
    calls, prompts = [], []
    predict, encode = trainer.backbone.predict, trainer.encoder.encode
    trainer.backbone.predict = lambda x, t, conditioning: (
        calls.append((*t.tolist(), torch.is_grad_enabled())) or predict(x, t, conditioning)
    )
    trainer.wrap_encoder(lambda batch: prompts.extend(batch) or encode(batch))
    trainer.step({"prompt": ["ab"]}, torch.Tensor.backward)
    sampled, replayed = ({t for t, grad in calls if grad is with_grad} for with_grad in (False, True))
    assert [t for t, grad in calls if not grad] == [999, 749, 499, 249]
    assert sampled == replayed and len(calls) == 8 and prompts == ["ab"]
    graded = {n for n, p in trainer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert graded == {n for n, _ in trainer.named_parameters() if ".lora_" in n}


# Errors


def test_config_rejects_contradictory_keys(world, tmp_path):
    with pytest.raises(ValueError, match=r"1000.*\b30\b.*num_ddim_timesteps"):
        build(num_ddim_timesteps=30)
    with pytest.raises(ConfigError, match=r"w_min.*w_max.*5\.0.*2\.0"):
        trainers.validate({"name": "lcm", "w_min": 5, "w_max": 2})
    with pytest.raises(ConfigError, match="solver"):
        trainers.validate({"name": "lcm-reward", "solver": "ddim"})
    with pytest.raises(ValueError, match=r"'lcm' uses no rewards"):
        trainers.build("lcm", Runtime(), backbone=tiny_backbone(), encoder=ToyEncoder(), rewards=[red])
    with pytest.raises(ValueError, match=r"'lcm'.*images"):
        build().loss({"prompt": ["ab"]})
    config = world.align_config(tmp_path)
    with pytest.raises(ConfigError, match="rewards: 'lcm'"):
        build_from_config({**config, "trainer": "lcm", "rewards": ["red"]})
    with pytest.raises(ConfigError, match="rewards: 'lcm-reward'"):
        build_from_config({**config, "trainer": "lcm-reward"})
    with pytest.raises(ConfigError, match=r"data: 'lcm'.*images.*'prompts'"):
        build_from_config({**config, "trainer": "lcm", "data": {"name": "prompts", "file": "a.txt"}})
