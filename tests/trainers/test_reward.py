"""Reward fine-tuning: the exact gradient, its settings, and a reward that rises."""

import pytest
import torch
from tiny import tiny_backbone
from torch import nn
from worlds import LORA, Squares, ToyEncoder, red

from longalign.backbones.configs import LoraConfig
from longalign.diffusion import add_noise, guide
from longalign.errors import ConfigError
from longalign.gradient_steps.steps import All, Last
from longalign.registry import gradient_steps, trainers
from longalign.rewards.base import Reward, Scores
from longalign.rewards.guard import NonFiniteReward
from longalign.trainers.batches import collate
from longalign.trainers.configs import RewardConfig
from longalign.trainers.reward import RewardTrainer

PROMPTS = {"prompt": ["ab", "cd", "e"]}
QUIET = LoraConfig(rank=2, dropout=0.0)


class Contrast(Reward):
    """Red minus blue, with both as parts."""

    def score_components(self, images, prompts):
        warm, cold = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
        return Scores(warm - cold, {"text_relevant": warm.detach(), "text_irrelevant": cold.detach()})


def build(lora=QUIET, rewards=(red,), gradient_steps=None, prediction="epsilon", dtype=torch.float32, **keys):
    torch.manual_seed(0)
    keys = {"num_steps": 4, "guidance": 3.0, **keys}
    config = RewardConfig(lora=lora, gradient_steps="all", **keys)
    trainer = RewardTrainer.from_config(
        config, tiny_backbone(prediction), ToyEncoder(), list(rewards), gradient_steps or Last(2)
    )
    with torch.no_grad():
        for i, p in enumerate(p for n, p in trainer.backbone.named_parameters() if ".lora_B." in n):
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    return trainer.to(dtype).train()


def gradient(trainer, batch=PROMPTS, seed=1, backward=torch.Tensor.backward):
    torch.manual_seed(seed)
    summary = trainer.step(batch, backward)
    out = [p.grad for p in trainer.trainable()]
    for p in trainer.trainable():
        p.grad = None
    return torch.cat([g.flatten() for g in out if g is not None]), summary


def plain_gradient(trainer, seed=1):
    """The reference: one graph through all steps that are taken, decoder and reward."""
    torch.manual_seed(seed)
    prompts = PROMPTS["prompt"]
    conditioning = trainer.encode([*prompts, ""])
    index = torch.tensor([0, 1, 2, 3, 3, 3])

    def sample(latents, timesteps, chosen, detach):
        solver = trainer.solve(timesteps)
        for i, t in enumerate(timesteps):
            with torch.set_grad_enabled(i in chosen):
                seen = torch.cat([latents.detach() if detach else latents] * 2)
                output = trainer.backbone.predict(seen, torch.full((6,), t), conditioning[index])
                output = guide(*output.chunk(2), trainer.guidance)
            latents = solver.step(i, latents, output)
        return latents

    noise = torch.randn(3, 4, 4, 4, dtype=torch.get_default_dtype())
    choice = trainer.gradient_steps.select(len(trainer.solver))
    timesteps = trainer.solver.timesteps[: choice.length]
    finals = [sample(noise, timesteps, choice.steps, choice.detach)]
    for _ in range(choice.copies):
        start, last = finals[0].detach(), timesteps[-1:]
        noisy = add_noise(trainer.backbone.noise_levels, start, torch.randn_like(start), torch.tensor(last))
        finals.append(sample(noisy, last, (0,), True))
    loss = 0.5 * (1 - torch.stack([red(trainer.backbone.decode(x), prompts).mean() for x in finals]).mean())
    loss.backward()
    out = torch.cat([p.grad.flatten() for p in trainer.trainable() if p.grad is not None])
    for p in trainer.trainable():
        p.grad = None
    return out, loss.detach()


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("lora", "keys"),
    [
        (LORA, {}),
        (LORA, {"prediction": "v_prediction", "train_adapter": True}),
        (None, {"gradient_steps": All()}),
        (LORA, {"decode_batch": 2}),
        (QUIET, {"denoise_batch": 2, "decode_batch": 1, "replay_batch": 2}),
    ],
    ids=["lora-dropout", "v-adapter", "full", "decode-batch", "micro-batches"],
)
def test_the_gradient_is_that_of_plain_autograd(double, lora, keys):
    trainer = build(lora=lora, dtype=double, **keys)
    expected, loss = plain_gradient(trainer)
    got, summary = gradient(trainer)
    assert expected.norm() > 0
    assert (got - expected).norm() / expected.norm() < 1e-6
    assert torch.isclose(summary["reward_loss"], loss)


SCHEDULES = [
    {"name": "all", "detach": False},
    {"name": "last", "k": 2, "detach": False},
    {"name": "grouped-random", "groups": 2},
    {"name": "grouped-random", "groups": 2, "detach": False},
    {"name": "refl", "early_stop": 3},
    {"name": "draft-k", "k": 3},
    {"name": "draft-lv", "copies": 2},
    {"name": "align-prop"},
    {"name": "drtune", "groups": 2, "early_stop": 2},
]


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_every_schedule_gives_the_gradient_of_plain_autograd(double, config):
    trainer = build(lora=LORA, dtype=double, gradient_steps=gradient_steps.build(config), train_adapter=True)
    expected, loss = plain_gradient(trainer)
    got, summary = gradient(trainer)
    assert expected.norm() > 0
    assert (got - expected).norm() / expected.norm() < 1e-6
    assert torch.isclose(summary["reward_loss"], loss)


def test_copies_are_scored_with_the_prompts_of_their_samples():
    seen = []

    def noting(images, prompts):
        seen.append(list(prompts))
        return red(images, prompts)

    gradient(build(rewards=[noting], gradient_steps=Last(1, copies=1), denoise_batch=2))
    assert seen == [["ab", "cd", "ab", "cd", "e", "e"]]


@pytest.mark.parametrize("gradient_steps", [Last(3), Last(3, detach=False)], ids=["detached", "undetached"])
def test_a_scale_put_on_backward_scales_the_gradient_once(double, gradient_steps):
    trainer = build(lora=LORA, dtype=double, gradient_steps=gradient_steps, train_adapter=True)
    expected, _ = gradient(trainer)
    got, _ = gradient(trainer, backward=lambda loss: (64 * loss).backward())
    assert (got / 64 - expected).norm() / expected.norm() < 1e-9


def test_without_guidance_one_branch_is_run():
    trainer = build(guidance=1.0)
    seen = []
    call = trainer.backbone.call

    def counting(denoiser, latents, timesteps, conditioning):
        seen.append((len(latents), len(conditioning.states)))
        return call(denoiser, latents, timesteps, conditioning)

    trainer.backbone.call = counting
    got, _ = gradient(trainer)
    assert got.norm() > 0
    assert seen == [(3, 3)] * (4 + 2)


def test_gradient_flows_into_what_is_trained_alone():
    trainer = build(rewards=[Contrast()])
    gradient_before = [p.requires_grad for p in trainer.encoder.parameters()]
    assert not any(gradient_before)
    trainer.step(PROMPTS, torch.Tensor.backward)
    graded = {n for n, p in trainer.named_parameters() if p.grad is not None}
    assert graded and all(".lora_" in n for n in graded)


def test_parts_are_logged_and_several_rewards_are_added():
    _, summary = gradient(build(rewards=[Contrast()]))
    assert set(summary) == {"reward_loss", "reward", "text_relevant", "text_irrelevant"}
    assert torch.isclose(summary["reward"], summary["text_relevant"] - summary["text_irrelevant"])
    assert torch.isclose(summary["reward_loss"], 0.5 * (1 - summary["reward"]))
    _, both = gradient(build(rewards=[Contrast(), red]))
    assert torch.isclose(both["reward"], both["0/reward"] + both["1/reward"])
    assert torch.isclose(both["0/text_relevant"], summary["text_relevant"])


def test_dropout_is_active_at_all_steps_or_at_the_chosen_ones():
    active = {}
    for where in ("all", "chosen"):
        trainer = build(lora=LORA, dropout_steps=where)
        modes = active[where] = []
        layer = next(m for m in trainer.backbone.denoiser.modules() if hasattr(m, "lora_A"))
        layer.register_forward_hook(lambda m, i, o, modes=modes: modes.append(m.lora_dropout["reward"].training))
        gradient(trainer)
    assert active["all"] == [True] * 6
    assert active["chosen"] == [False, False, True, True, True, True]


@pytest.mark.parametrize("lora", [QUIET, None])
def test_kl_pulls_towards_the_start_model(lora):
    trainer = build(lora=lora, regularizer="kl", regularizer_weight=2.0)
    if lora is None:
        with torch.no_grad():
            trainer.backbone.denoiser.conv_out.bias.add_(0.5)
    got, summary = gradient(trainer)
    without, _ = gradient(build(lora=lora) if lora else _moved(build(lora=lora)))
    assert summary["kl_loss"] > 0
    if lora is None:  # the guided answers differ by 0.5 at every place
        assert summary["kl_loss"].item() == pytest.approx(2.0 * 0.25, rel=1e-3)
    assert (got - without).norm() > 1e-6


def test_kl_takes_the_latents_as_they_are(double):
    parts = []
    for detach in (True, False):
        gradient_steps = Last(3, detach=detach)
        with_kl, _ = gradient(
            build(dtype=double, gradient_steps=gradient_steps, regularizer="kl", regularizer_weight=2.0)
        )
        without, _ = gradient(build(dtype=double, gradient_steps=gradient_steps))
        parts.append(with_kl - without)
    assert parts[0].norm() > 0
    assert (parts[0] - parts[1]).norm() / parts[0].norm() < 1e-9


def _moved(trainer):
    with torch.no_grad():
        trainer.backbone.denoiser.conv_out.bias.add_(0.5)
    return trainer


def test_pretraining_needs_images_and_adds_its_loss():
    trainer = build(regularizer="pretraining", regularizer_weight=0.5)
    with pytest.raises(ValueError, match="the regularizer 'pretraining' needs images"):
        trainer.step(PROMPTS, torch.Tensor.backward)
    assert trainer.needs_images and not build().needs_images
    batch = collate([Squares()[i] for i in (1, 5, 7)])
    got, summary = gradient(trainer, batch)
    without, _ = gradient(build(), batch)
    assert summary["pretraining_loss"] > 0
    assert (got - without).norm() > 1e-6


def test_losses_are_values_without_gradient():
    trainer = build()
    losses = trainer.losses(PROMPTS)
    assert set(losses) == {"reward_loss", "reward"} and not losses["reward_loss"].requires_grad


def test_a_reward_that_is_not_finite_stops_with_its_image():
    def broken(images, prompts):
        return images[:, 0].mean((1, 2)) * torch.tensor([1.0, float("nan"), 1.0])

    with pytest.raises(NonFiniteReward) as caught:
        build(rewards=[broken]).step(PROMPTS, torch.Tensor.backward)
    assert caught.value.prompt == "cd" and caught.value.image.shape == (3, 8, 8)


def test_dropout_of_the_denoiser_itself_is_not_repeated_for_several_steps_at_once():
    trainer = build(lora=None, replay_batch=2)
    trainer.backbone.denoiser.conv_out.register_forward_hook(lambda m, i, output: nn.functional.dropout(output, 0.1))
    with pytest.raises(ValueError, match="replay_batch: 1"):
        trainer.step(PROMPTS, torch.Tensor.backward)


def test_contradictory_configs():
    for keys, message in (
        ({"replay_batch": 2}, "set replay_batch to 1 or lora.dropout to 0"),
        ({"replay_batch": 2, "lora": None, "gradient_steps": "draft-k"}, "with 'draft-k' the gradient flows through"),
        (
            {"replay_batch": 2, "lora": None, "gradient_steps": {"name": "all", "detach": False}},
            "set replay_batch to 1",
        ),
        ({"regularizer_weight": 1.0}, "no effect without a regularizer"),
        ({"regularizer": "kl"}, "needs a regularizer_weight"),
        ({"regularizer": "kl", "regularizer_weight": 1.0, "train_adapter": True}, "set train_adapter to false"),
        ({"guidance": 0.5}, "guidance"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainers.validate({"name": "reward", **keys})
    assert trainers.validate({"name": "reward", "replay_batch": 2, "lora": None}).replay_batch == 2


def test_half_precision_keeps_the_gradient_of_single_pixels():
    def faint(images, prompts):
        return 1e-3 * red(images, prompts)

    found = []
    for half in (False, True):
        trainer = build(rewards=[faint])
        if half:
            trainer.backbone.vae.half()
        found.append(gradient(trainer)[0])
    whole, halved = found
    assert torch.cosine_similarity(whole, halved, dim=0) > 0.99
    assert halved.norm() / whole.norm() == pytest.approx(1, abs=0.02)
    # a reward so steep that the scaled loss is infinite is scaled less
    steep = build(rewards=[lambda images, prompts: 1e5 * red(images, prompts)])
    steep.backbone.vae.half()
    assert gradient(steep)[0].isfinite().all()


def test_networks_of_rewards_stay_in_eval_mode():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, images, prompts):
            return self.dropout(images).mean((1, 2, 3))

    trainer = build(rewards=[Network()])
    network = trainer.rewards[0].function
    assert trainer.rewards[0].training and not network.training and not network.dropout.training


def test_no_reward_is_refused():
    with pytest.raises(ValueError, match="at least one reward, got none"):
        build(rewards=[])


@pytest.mark.parametrize("solver", ["ddim", "lcm"])
def test_the_reward_rises(solver):
    guidance = 1.0 if solver == "lcm" else 2.0
    trainer = build(lora=QUIET, solver=solver, guidance=guidance, num_steps=2, gradient_steps=All(), resolution=8)
    nn.init.normal_(trainer.backbone.vae.decoder.conv_out.weight, std=0.3)
    optimizer = torch.optim.Adam(trainer.trainable(), lr=3e-2)

    def held_out():
        torch.manual_seed(99)
        return trainer.losses({"prompt": [f"{i}" for i in range(8)]})["reward"].item()

    before = held_out()
    for _ in range(8):
        trainer.step(PROMPTS, torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert held_out() > before + 0.03
