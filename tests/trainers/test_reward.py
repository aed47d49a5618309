"""Reward fine-tuning: the exact gradient, its settings, and an increase of the reward."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from worlds import LORA, Squares, ToyEncoder, red

from longalign.backbones.config import LoraConfig
from longalign.directions import Direction
from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.concat import ConcatEncoder
from longalign.errors import ConfigError
from longalign.functional.diffusion import add_noise, guide
from longalign.loop.batches import collate
from longalign.registry import gradient_steps, trainers
from longalign.rewards.base import EmbeddingReward, Reward, Scores
from longalign.rewards.guard import NonFiniteReward
from longalign.runtime import Runtime
from longalign.testing.tiny import edited, steps, tiny_backbone
from longalign.trainers.reward.config import RewardConfig
from longalign.trainers.reward.trainer import RewardTrainer

PROMPTS = {"prompt": ["ab", "cd", "e"]}
NO_DROPOUT = LoraConfig(rank=2, dropout=0.0)


class Moving(Encoder):
    """States that a trainable layer maps when the timestep is known."""

    dim = 8

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def encode(self, prompts):
        return MovingConditioning(ToyEncoder(with_adapter=False).encode(prompts).states, layer=self.layer)


@dataclass(frozen=True)
class MovingConditioning(Conditioning):
    layer: Any = None

    def at(self, timestep):
        return Conditioning(self.layer(self.states * timestep.view(-1, 1, 1) / 500))


class Contrast(Reward):
    """Red minus blue, with both as parts."""

    def score_components(self, images, prompts):
        warm, cold = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
        return Scores(warm - cold, {"text_relevant": warm.detach(), "text_irrelevant": cold.detach()})


class Letters(EmbeddingReward):
    """Compares the mean colour with counts of three letters."""

    dim = 3

    def image_features(self, images):
        return nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, prompts):
        return nn.functional.normalize(torch.tensor([[p.count(c) + 1.0 for c in "ade"] for p in prompts]), dim=-1)


def build(
    lora=NO_DROPOUT,
    rewards=(red,),
    gradient_steps=None,
    prediction="epsilon",
    dtype=torch.float32,
    encoder=None,
    **keys,
):
    torch.manual_seed(0)
    keys = {"num_steps": 4, "guidance": 3.0, **keys}
    config = RewardConfig(lora=lora, gradient_steps="all", **keys)
    parts = {"backbone": tiny_backbone(prediction), "encoder": encoder or ToyEncoder(), "rewards": list(rewards)}
    trainer = RewardTrainer.from_config(config, Runtime(), **parts)
    trainer.gradient_steps = gradient_steps or steps("last", k=2)
    with torch.no_grad():
        for i, p in enumerate(p for n, p in trainer.backbone.named_parameters() if ".lora_B." in n):
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    return trainer.to(dtype).train()


def gradient(trainer, batch=PROMPTS, seed=1, backward=torch.Tensor.backward):
    torch.manual_seed(seed)
    losses = trainer.step(batch, backward)
    out = [p.grad for p in trainer.trainable()]
    for p in trainer.trainable():
        p.grad = None
    return torch.cat([g.flatten() for g in out if g is not None]), losses


def plain_gradient(trainer, seed=1, guided=None):
    """The reference: autograd through one graph of all sampling steps, decoder and reward; ``guided`` steps or all."""
    torch.manual_seed(seed)
    prompts = PROMPTS["prompt"]
    conditioning = trainer.encode([*prompts, ""])
    index = torch.tensor([0, 1, 2, 3, 3, 3])

    def sample(latents, timesteps, grad_steps, detach):
        solver, previous = trainer.solve(timesteps), None
        for i, t in enumerate(timesteps):
            with torch.set_grad_enabled(i in grad_steps):
                inputs = torch.cat([latents.detach() if detach else latents] * 2)
                output = trainer.backbone.predict(inputs, torch.full((6,), t), conditioning[index])
                output = guide(*output.chunk(2), trainer.guidance if guided is None or t in guided else 1.0)
            latents, previous = solver.step(i, latents, output, previous)
        return latents

    noise = torch.randn(3, 4, 4, 4, dtype=torch.get_default_dtype())
    selected = trainer.gradient_steps.select(len(trainer.solver))
    timesteps = trainer.solver.timesteps[: selected.length]
    finals = [sample(noise, timesteps, selected.steps, selected.detach)]
    for _ in range(selected.copies):
        start, last = finals[0].detach(), timesteps[-1:]
        noisy = add_noise(trainer.backbone.noise_levels, start, torch.randn_like(start), torch.tensor(last))
        finals.append(sample(noisy, last, (0,), True))
    scores = [sum(reward.score(trainer.backbone.decode(x), prompts) for reward in trainer.rewards) for x in finals]
    loss = 0.5 * (1 - torch.stack([score.mean() for score in scores]).mean())
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
        (None, {"gradient_steps": steps("all")}),
        (LORA, {"decode_batch": 2}),
        (NO_DROPOUT, {"denoise_batch": 2, "decode_batch": 1, "replay_batch": 2}),
    ],
    ids=["lora-dropout", "v-adapter", "full", "decode-batch", "micro-batches"],
)
def test_step_gradient_equals_autograd(double, lora, keys):
    trainer = build(lora=lora, dtype=double, **keys)
    expected, loss = plain_gradient(trainer)
    got, losses = gradient(trainer)
    assert expected.norm() > 0
    assert (got - expected).norm() / expected.norm() < 1e-6
    assert torch.isclose(losses["reward_loss"], loss)


def test_step_gradient_of_conditioning_at_timesteps_equals_autograd(double):
    encoder = ConcatEncoder([ToyEncoder(dropout=0.0), Moving()])
    trainer = build(encoder=encoder, train_adapter=True, dtype=double)
    expected, _ = plain_gradient(trainer)
    got, _ = gradient(trainer)
    assert len(trainer.trainable()) == len(trainer.backbone.lora_state()[0].state) + 4  # both layers of the encoder
    assert (got - expected).norm() / expected.norm() < 1e-6


GRADIENT_STEPS = [
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


@pytest.mark.parametrize(("solver", "replays"), [("ddim", ("recompute", 1e-9)), ("dpm++", ("recompute", "keep"))])
@pytest.mark.parametrize("config", GRADIENT_STEPS, ids=str)
def test_step_gradient_equals_autograd_for_each_gradient_steps(double, config, solver, replays):
    keys = {"lora": LORA, "dtype": double, "train_adapter": True, "solver": solver}
    keys["gradient_steps"] = gradient_steps.build(config)
    expected, loss = plain_gradient(build(**keys))
    assert expected.norm() > 0
    for replay in replays:
        got, losses = gradient(build(**keys, replay=replay))
        assert (got - expected).norm() / expected.norm() < 1e-6
        assert torch.isclose(losses["reward_loss"], loss)


@pytest.mark.parametrize(
    ("edit", "direction"),
    [
        ({"name": "none"}, "batch"),
        ({"name": "direction", "omega": 0.2}, "batch"),
        ({"name": "direction", "omega": 0.0}, "running"),
        ({"name": "pairs", "positive": "a", "negative": "z"}, "running"),
        ({"name": "measured"}, "batch"),
    ],
    ids=str,
)
def test_step_gradient_of_edited_rewards_equals_autograd(double, tmp_path, edit, direction):
    inner = Letters()
    if edit["name"] == "measured":
        direction_file = Direction.of(inner, torch.tensor([0.0, 0.6, 0.8]), kind="learned")
        edit = {**edit, "file": str(direction_file.save(tmp_path / "D.safetensors"))}
    reward = edited(inner, edit.pop("name"), direction, **edit)
    trainer = build(lora=LORA, dtype=double, rewards=[reward])
    expected, loss = plain_gradient(trainer)
    got, losses = gradient(trainer)
    assert expected.norm() > 0
    assert (got - expected).norm() / expected.norm() < 1e-6
    assert torch.isclose(losses["reward_loss"], loss)
    assert {"text_relevant", "text_irrelevant", "eta", "edit_norm"} <= losses.keys()
    assert direction != "running" or reward.common.running_count == 6


@pytest.mark.parametrize(
    "keys",
    [
        {"replay_batch": 3},
        {"gradient_steps": steps("all", detach=False), "solver": "dpm++"},
        {"gradient_steps": steps("draft-lv", copies=1), "dropout_steps": "gradient"},
    ],
    ids=["replay-batch", "undetached", "copies"],
)
def test_step_gradient_with_guidance_interval_equals_autograd(double, keys):
    """Noise levels of the four steps are 14.6, 4.1, 1.6 and 0.7."""
    keys = {"gradient_steps": steps("all"), **keys}
    trainer = build(dtype=double, guidance_interval=(1, 5), train_adapter=True, **keys)
    calls, predict = [], trainer.backbone.predict

    def counting(latents, timesteps, conditioning):
        calls.append((int(timesteps[0]), len(latents)))
        return predict(latents, timesteps, conditioning)

    trainer.backbone.predict = counting
    got, losses = gradient(trainer)
    assert calls[:4] == [(999, 3), (749, 6), (499, 6), (249, 3)]
    if "replay_batch" in keys:  # steps without and with guidance are recomputed in different calls
        assert [rows for _, rows in calls[4:]] == [3, 12, 3]
    expected, loss = plain_gradient(trainer, guided=(749, 499))
    assert (got - expected).norm() / expected.norm() < 1e-6
    assert torch.isclose(losses["reward_loss"], loss)


def test_guidance_interval_without_steps():
    with pytest.raises(ValueError, match=r"guidance_interval 20 to 30.*4 steps.*from 0\.\d+ to 14\.6"):
        build(guidance_interval=(20, 30))


def test_kept_graphs_save_calls_up_to_their_memory():
    counts = {}
    for replay in ("recompute", "keep", 1e-9, 1.0):
        trainer = build(num_steps=4, guidance=1.0, gradient_steps=steps("last", k=2), replay=replay)
        predict, calls = trainer.backbone.predict, []
        trainer.backbone.predict = lambda *args, predict=predict, calls=calls: calls.append(1) or predict(*args)
        gradient(trainer)
        counts[replay] = len(calls)
    assert counts == {"recompute": 6, "keep": 4, 1e-9: 5, 1.0: 4}


@pytest.mark.parametrize(("dropout_steps", "projections"), [("all", 1), ("gradient", 2)])
def test_rollout_computes_keys_of_text_once(dropout_steps, projections):
    """Once for all four calls, for three prompts and the empty one; and in each of the two replayed calls."""
    trainer, rows = build(dropout_steps=dropout_steps), []
    layer = trainer.backbone.denoiser.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    layer.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    gradient(trainer)
    assert rows == [4] * (projections + 2)


def test_score_uses_prompts_of_copied_samples():
    scored = []

    def recording(images, prompts):
        scored.append(list(prompts))
        return red(images, prompts)

    gradient(build(rewards=[recording], gradient_steps=steps("draft-lv", copies=1), denoise_batch=2))
    assert scored == [["ab", "cd", "ab", "cd", "e", "e"]]


@pytest.mark.parametrize(
    "gradient_steps", [steps("last", k=3), steps("last", k=3, detach=False)], ids=["detached", "undetached"]
)
def test_scaled_backward_scales_gradient_once(double, gradient_steps):
    trainer = build(lora=LORA, dtype=double, gradient_steps=gradient_steps, train_adapter=True)
    expected, _ = gradient(trainer)
    got, _ = gradient(trainer, backward=lambda loss: (64 * loss).backward())
    assert (got / 64 - expected).norm() / expected.norm() < 1e-9


def test_guidance_1_runs_one_branch():
    trainer = build(guidance=1.0)
    sizes = []
    call = trainer.backbone.call

    def recording(denoiser, latents, timesteps, conditioning):
        sizes.append((len(latents), len(conditioning.states)))
        return call(denoiser, latents, timesteps, conditioning)

    trainer.backbone.call = recording
    got, _ = gradient(trainer)
    assert got.norm() > 0
    assert sizes == [(3, 3)] * (4 + 2)


def test_step_gradient_reaches_only_trainable_parameters():
    trainer = build(rewards=[Contrast()])
    assert not any(p.requires_grad for p in trainer.encoder.parameters())
    trainer.step(PROMPTS, torch.Tensor.backward)
    graded = {n for n, p in trainer.named_parameters() if p.grad is not None}
    assert graded and all(".lora_" in n for n in graded)


def test_metrics_include_parts_and_sum_several_rewards():
    _, losses = gradient(build(rewards=[Contrast()]))
    assert set(losses) == {"reward_loss", "reward", "text_relevant", "text_irrelevant"}
    assert torch.isclose(losses["reward"], losses["text_relevant"] - losses["text_irrelevant"])
    assert torch.isclose(losses["reward_loss"], 0.5 * (1 - losses["reward"]))
    _, both = gradient(build(rewards=[Contrast(), red]))
    assert torch.isclose(both["reward"], both["0/reward"] + both["1/reward"])
    assert torch.isclose(both["0/text_relevant"], losses["text_relevant"])


def test_dropout_steps_all_and_gradient():
    active = {}
    for dropout_steps in ("all", "gradient"):
        trainer = build(lora=LORA, dropout_steps=dropout_steps)
        modes = active[dropout_steps] = []
        layer = next(m for m in trainer.backbone.denoiser.modules() if hasattr(m, "lora_A"))
        layer.register_forward_hook(lambda m, i, o, modes=modes: modes.append(m.lora_dropout["reward"].training))
        gradient(trainer)
    assert active["all"] == [True] * 6
    assert active["gradient"] == [False, False, True, True, True, True]


@pytest.mark.parametrize("lora", [NO_DROPOUT, None])
def test_kl_penalises_distance_to_reference_model(lora):
    trainer = build(lora=lora, regularizer="kl", regularizer_weight=2.0)
    if lora is None:
        _with_shifted_bias(trainer)
    got, losses = gradient(trainer)
    without, _ = gradient(build(lora=lora) if lora else _with_shifted_bias(build(lora=lora)))
    assert losses["kl_loss"] > 0
    if lora is None:  # the guided predictions differ by 0.5 everywhere
        assert losses["kl_loss"].item() == pytest.approx(2.0 * 0.25, rel=1e-3)
    assert (got - without).norm() > 1e-6


def test_kl_gradient_does_not_flow_through_latents(double):
    kl_gradients = []
    for detach in (True, False):
        gradient_steps = steps("last", k=3, detach=detach)
        with_kl, _ = gradient(
            build(dtype=double, gradient_steps=gradient_steps, regularizer="kl", regularizer_weight=2.0)
        )
        without, _ = gradient(build(dtype=double, gradient_steps=gradient_steps))
        kl_gradients.append(with_kl - without)
    assert kl_gradients[0].norm() > 0
    assert (kl_gradients[0] - kl_gradients[1]).norm() / kl_gradients[0].norm() < 1e-9


def _with_shifted_bias(trainer):
    with torch.no_grad():
        trainer.backbone.denoiser.conv_out.bias.add_(0.5)
    return trainer


def test_pretraining_requires_images_and_adds_its_loss():
    trainer = build(regularizer="pretraining", regularizer_weight=0.5)
    with pytest.raises(ValueError, match=r"'pretraining'.*images"):
        trainer.step(PROMPTS, torch.Tensor.backward)
    assert trainer.needs_images and not build().needs_images
    batch = collate([Squares()[i] for i in (1, 5, 7)])
    got, losses = gradient(trainer, batch)
    without, _ = gradient(build(), batch)
    assert losses["pretraining_loss"] > 0
    assert (got - without).norm() > 1e-6


def test_losses_of_step_have_no_gradient():
    _, losses = gradient(build())
    assert set(losses) == {"reward_loss", "reward"} and not losses["reward_loss"].requires_grad


def test_non_finite_reward_raises_with_image_and_prompt():
    def broken(images, prompts):
        return images[:, 0].mean((1, 2)) * torch.tensor([1.0, float("nan"), 1.0])

    with pytest.raises(NonFiniteReward) as caught:
        build(rewards=[broken]).step(PROMPTS, torch.Tensor.backward)
    assert caught.value.prompt == "cd" and caught.value.image.shape == (3, 8, 8)


def test_replay_batch_2_rejects_denoiser_with_dropout():
    trainer = build(lora=None, replay_batch=2)
    trainer.backbone.denoiser.conv_out.register_forward_hook(lambda m, i, output: nn.functional.dropout(output, 0.1))
    with pytest.raises(ValueError, match="replay_batch: 1"):
        trainer.step(PROMPTS, torch.Tensor.backward)


def test_config_rejects_contradictory_keys():
    not_detached = {"name": "all", "detach": False}
    for keys, message in (
        ({"replay_batch": 2}, r"replay_batch is 2.*lora\.dropout"),
        ({"replay_batch": 2, "lora": None, "replay": "keep"}, "replay_batch is 2.*'keep'.*1"),
        ({"replay_batch": 2, "lora": None, "gradient_steps": "draft-k"}, "replay_batch is 2.*'draft-k'"),
        ({"replay_batch": 2, "lora": None, "gradient_steps": not_detached}, "replay_batch is 2.*'all'"),
        ({"regularizer_weight": 1.0}, "regularizer_weight.*'kl' or 'pretraining'"),
        ({"regularizer": "kl"}, "'kl'.*regularizer_weight"),
        ({"regularizer": "kl", "regularizer_weight": 1.0, "train_adapter": True}, "'kl'.*train_adapter.*'pretraining'"),
        ({"guidance": 0.5}, r"guidance.*0\.5"),
        ({"guidance_interval": [2, 1]}, "guidance_interval.*increasing.*2 and 1"),
        ({"guidance_interval": [0, 1], "guidance": 1}, "guidance_interval has no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainers.validate({"name": "reward", **keys})
    assert trainers.validate({"name": "reward", "replay_batch": 2, "lora": None}).replay_batch == 2


def test_latent_gradient_in_float16_does_not_underflow():
    def faint(images, prompts):
        return 1e-3 * red(images, prompts)

    gradients = []
    for half in (False, True):
        trainer = build(rewards=[faint])
        if half:
            trainer.backbone.vae.half()
        gradients.append(gradient(trainer)[0])
    full_precision, half_precision = gradients
    assert torch.cosine_similarity(full_precision, half_precision, dim=0) > 0.99
    assert half_precision.norm() / full_precision.norm() == pytest.approx(1, abs=0.02)
    # the scale is reduced if the gradient of a steep reward overflows
    steep = build(rewards=[lambda images, prompts: 1e5 * red(images, prompts)])
    steep.backbone.vae.half()
    assert gradient(steep)[0].isfinite().all()


def test_train_keeps_reward_networks_in_eval_mode():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, images, prompts):
            return self.dropout(images).mean((1, 2, 3))

    trainer = build(rewards=[Network()])
    network = trainer.rewards[0].function
    assert trainer.rewards[0].training and not network.training and not network.dropout.training


def test_trainer_rejects_empty_rewards():
    with pytest.raises(ValueError, match=r"at least one reward.*got none"):
        build(rewards=[])


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "lcm"])
def test_training_increases_reward(solver):
    guidance = 1.0 if solver == "lcm" else 2.0
    trainer = build(
        lora=NO_DROPOUT, solver=solver, guidance=guidance, num_steps=2, gradient_steps=steps("all"), resolution=8
    )
    nn.init.normal_(trainer.backbone.vae.decoder.conv_out.weight, std=0.3)
    optimizer = torch.optim.Adam(trainer.trainable(), lr=3e-2)

    def held_out():
        _, losses = gradient(trainer, {"prompt": [f"{i}" for i in range(8)]}, seed=99)
        return losses["reward"].item()

    before = held_out()
    for _ in range(8):
        trainer.step(PROMPTS, torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert held_out() > before + 0.03


def test_sample_reads_no_values_of_tensors():
    """Meta tensors have no values. On a GPU, reading a value would delay the launches of all further steps."""
    trainer = build(num_steps=4, guidance=3.0).to("meta")

    def encode(texts):
        return Conditioning(torch.empty(len(texts), 4, 8, device="meta"), reports=(PromptReport(("a",), (1,)),) * 3)

    trainer.wrap_encoder(encode)
    conditioning, selected = trainer.encode_with_uncond(["a", "b"]), trainer.gradient_steps.select(4)
    (sampled,) = trainer.sample(selected, trainer.noise(2), conditioning, slice(0, 2))
    assert sampled.final.shape == (2, 4, 4, 4) and len(sampled.recorded) == len(selected.steps)
