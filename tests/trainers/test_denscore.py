"""Training a CLIP on preference pairs: the losses, what is trained, several processes, and what comes of a run."""

import json
import math
from threading import Barrier, Thread

import pytest
import torch
from tiny import tiny_clip
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from longalign import build_from_config, load_config
from longalign.checkpoint import load_for_sampling, load_weights
from longalign.config import to_dict
from longalign.errors import ConfigError
from longalign.publish import export
from longalign.registry import rewards
from longalign.runtime import Runtime
from longalign.trainers.configs import DenscoreTrainerConfig
from longalign.trainers.denscore import DenscoreTrainer, divergence, pairwise_accuracy

TWO = "A red fox sleeps on a wall. The sky is green."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(tiny_clip(tmp_path_factory.mktemp("clip"), width=8))


def build(clip, runtime=None, reward=None, **settings):
    part = rewards.build({"name": "denscore", "checkpoint": clip, **(reward or {})})
    return DenscoreTrainer(part, runtime, **settings).train()


def batch(b=3, captions=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = [TWO, "The sky. A wall. A fox.", "A red sky.", "A green fox."][:b]
    out = {
        "prompt": prompts,
        "image": torch.rand((b, 2, 3, 32, 32), generator=generator),
        "preference": torch.tensor([1.0, 0.2, 0.5, 0.9][:b]),
    }
    captioned = [(f"{p} A wall.", "Green. Red. Sky.") for p in prompts]
    return {**out, "captions": captioned} if captions else out


def config(clip, output, **keys):
    return {
        "rewards": [{"name": "denscore", "checkpoint": clip}],
        "trainer": "denscore",
        "data": {"name": "scene-pairs", "size": 8, "objects": [1, 2], "words": [10, 20], "captions": True},
        "loop": {"steps": 4, "batch_size": 3, "lr": 1e-3, "save_every": 2, "log_every": 1},
        "output": str(output),
        **keys,
    }


def features(trainer, given):
    """By hand: unit embeddings of images (b, 2, d), of each prompt's segments, and their means (b, d)."""
    images = F.normalize(trainer.reward.towers.embed_pixels((given["image"].flatten(0, 1) - 0.5) / 0.25), dim=-1)
    segments = [
        F.normalize(trainer.reward.towers.embed_texts([s.strip(" .") + "." for s in p.split(".") if s]), dim=-1)
        for p in given["prompt"]
    ]
    return images.view(len(segments), 2, -1), segments, torch.stack([s.mean(0) for s in segments])


# The losses


def test_the_divergence_by_hand():
    target = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    logits = torch.tensor([[math.log(0.25), math.log(0.75)], [0.0, 0.0]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(logits, target).item() == pytest.approx((first + math.log(2)) / 2, abs=1e-6)
    assert divergence(torch.tensor([[3.0, 3.0]]), target[:1]).item() == pytest.approx(0, abs=1e-6)


def test_agreement_counts_pairs_without_preference_half():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert pairwise_accuracy(scores, torch.tensor([0.9, 0.1, 0.0, 0.5])).item() == (1 + 0 + 1 + 0.5) / 4


def test_losses_and_metrics_are_those_of_the_rewards_own_scores(clip):
    trainer, given = build(clip, contrastive_weight=2.0), batch()
    out = trainer.losses(given)
    images, segments, text = features(trainer, given)
    scale = trainer.reward.towers.logit_scale.exp()
    scores = scale * (images * text[:, None]).sum(-1)
    for i in range(2):
        own = trainer.reward.score(given["image"][:, i], given["prompt"])
        assert torch.allclose(scores[:, i], scale * own, atol=1e-4)
    first = given["preference"]
    log = scores.log_softmax(-1)
    expected = torch.special.entr(first) + torch.special.entr(1 - first) + first * log[:, 0] + (1 - first) * log[:, 1]
    assert torch.allclose(out["preference_loss"], -expected.mean(), atol=1e-5)

    rows = []
    for i, parts in enumerate(segments):
        for segment in parts:
            log = (scale * images.flatten(0, 1) @ segment).log_softmax(0)
            p = torch.stack([first[i], 1 - first[i]])
            rows.append(-(torch.special.entr(p) + p * log[2 * i : 2 * i + 2]).sum())
    assert len(rows) == 2 + 3 + 1
    assert torch.allclose(out["contrastive_loss"], 2 * torch.stack(rows).mean(), atol=1e-5)

    shown = torch.stack([images[0, 0], images[1, 1], images[2, 0]])
    assert out["r_at_1"] == ((text @ shown.T).argmax(1) == torch.arange(3)).float().mean()
    hits = [(parts @ shown.T).argmax(1) == i for i, parts in enumerate(segments)]
    assert out["segment_r_at_1"] == torch.cat(hits).float().mean()
    common = F.normalize(text.mean(0), dim=0)
    assert torch.allclose(out["eta"], (text @ common).mean(), atol=1e-6)
    assert out["scale"] == scale and not out["scale"].requires_grad


def test_captions_are_told_of_their_own_image_only(clip):
    trainer, given = build(clip, preference_weight=0.0, contrastive_weight=1.0), batch(2, captions=True)
    out = trainer.losses(given)
    assert "preference_loss" not in out
    images = features(trainer, given)[0].flatten(0, 1)
    texts = [text for pair in given["captions"] for text in pair]
    expected_texts = {  # which of the four texts each segment is in; one may be in a text twice
        "A red fox sleeps on a wall.": [0], "The sky is green.": [0], "A wall.": [0, 2, 2], "Green.": [1, 3],
        "Red.": [1, 3], "Sky.": [1, 3], "The sky.": [2], "A fox.": [2],
    }  # fmt: skip
    rows = []
    for segment, places in expected_texts.items():
        (unit,), _ = trainer.reward.segment_features([segment])
        log = (trainer.reward.towers.logit_scale.exp() * images @ unit).log_softmax(0)
        share = torch.bincount(torch.tensor(places), minlength=4) / len(places)
        rows += [(torch.special.entr(share).neg() - share * log).sum()] * len(places)
    assert len(rows) == 3 + 3 + 4 + 3
    assert torch.allclose(out["contrastive_loss"], torch.stack(rows).mean(), atol=1e-5)
    text = trainer.reward.text_features(texts)
    assert out["r_at_1"] == ((text @ images.T).argmax(1) == torch.arange(4)).float().mean()
    # which image is preferred plays no part
    other = {**given, "preference": 1 - given["preference"]}
    assert torch.equal(trainer.losses(other)["contrastive_loss"], out["contrastive_loss"])


def test_a_text_longer_than_the_window_is_read_to_its_end(clip):
    trainer, given = build(clip), batch(2)
    scores = []
    for end in ("fox", "sky"):
        given["prompt"][0] = "a " * 80 + end
        scores.append(trainer.losses(given)["preference_loss"].item())
    assert scores[0] != scores[1]


# What is trained


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("all", {"text_model", "text_projection", "vision_model", "visual_projection", "logit_scale"}),
        ("text", {"text_model", "text_projection", "logit_scale"}),
        ("vision", {"vision_model", "visual_projection", "logit_scale"}),
        ("projections", {"text_projection", "visual_projection", "logit_scale"}),
    ],
)
def test_gradient_reaches_what_is_trained_and_nothing_else(clip, train, expected):
    trainer = build(clip, train=train)
    trainer.step(batch(captions=True), torch.Tensor.backward)
    model = trainer.reward.towers.model
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in moved} == expected
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(p) for p in trainer.trainable()]
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


def test_micro_batches_and_recomputed_activations_change_no_gradient(clip):
    found = []
    for reward, recomputed in (({}, False), ({"micro_batch": 4}, False), ({}, True)):
        trainer = build(clip, reward=reward)
        if recomputed:
            trainer.enable_gradient_checkpointing()
        trainer.step(batch(), torch.Tensor.backward)
        found.append([p.grad for p in trainer.trainable()])
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0], other, strict=True))


def test_the_temperature_stays_at_its_limit_and_can_leave_it(clip):
    trainer = build(clip)
    scale = trainer.reward.towers.logit_scale
    with torch.no_grad():
        scale.fill_(9.0)
    trainer.on_optimizer_step()
    assert scale.exp().item() == pytest.approx(100, rel=1e-5)
    trainer.step(batch(), torch.Tensor.backward)
    assert scale.grad != 0


def test_an_untrainable_reward_is_refused():
    class Other(torch.nn.Module):
        pass

    from longalign.rewards.towers import Towers

    reward = Other()
    reward.towers = Towers()
    with pytest.raises(ValueError, match="Towers cannot be trained; expected a reward from a transformers CLIPModel"):
        DenscoreTrainer(reward)


def test_two_processes_have_the_gradient_of_one(clip):
    whole = batch(4, captions=True)
    alone = build(clip)
    values = alone.step(whole, torch.Tensor.backward)
    barrier, seen = Barrier(2), [None, None]

    def gather(rank):
        def exchange(tensor):
            seen[rank] = tensor
            barrier.wait()
            out = torch.cat(seen)
            barrier.wait()
            return out

        return exchange

    both = [build(clip, Runtime(gather=gather(rank), rank=rank, processes=2)) for rank in range(2)]
    results = [None, None]

    def work(rank):
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in whole.items()}
        results[rank] = both[rank].step(part, torch.Tensor.backward)

    threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for key, value in values.items():
        assert torch.allclose(results[0][key], value, atol=1e-5) and torch.allclose(
            results[1][key], value, atol=1e-5
        ), key
    for p, a, b in zip(*(t.trainable() for t in (alone, *both)), strict=True):
        assert torch.allclose(p.grad, (a.grad + b.grad) / 2, atol=1e-4 * p.grad.abs().max().item() + 1e-6)


# A run


def lines(output):
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def test_a_run_resumes_exactly_and_its_folder_is_a_clip_that_rewards_load(clip, tmp_path):
    ema = {"steps": 4, "batch_size": 3, "lr": 1e-3, "save_every": 2, "log_every": 1, "ema": 0.5}
    whole = build_from_config(config(clip, tmp_path / "whole", loop=ema)).fit()
    build_from_config(config(clip, tmp_path / "cut", loop={**ema, "steps": 2})).fit()
    rest = build_from_config(config(clip, tmp_path / "cut", loop=ema)).fit(resume=tmp_path / "cut")
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    first = lines(tmp_path / "whole")[0]
    losses = {"loss", "preference_loss", "contrastive_loss"}
    assert set(first) == losses | {
        "step", "agreement", "r_at_1", "segment_r_at_1", "eta", "scale", "grad_norm", "lr"
    }  # fmt: skip
    assert first["loss"] == pytest.approx(first["preference_loss"] + first["contrastive_loss"], rel=1e-6)

    models = [CLIPModel.from_pretrained(result.checkpoint / "reward") for result in (whole, rest)]
    start = CLIPModel.from_pretrained(clip).state_dict()
    states = [model.state_dict() for model in models]
    assert states[0].keys() == start.keys() and all(torch.equal(states[0][k], states[1][k]) for k in start)
    assert not torch.equal(states[0]["text_projection.weight"], start["text_projection.weight"])
    raw = torch.load(whole.checkpoint / "resume" / "shared.pt", weights_only=True)["parameters"]
    assert not any(torch.equal(p, states[0]["text_projection.weight"]) for p in raw)  # what is saved is the average

    folder = str(whole.checkpoint / "reward")
    images, prompts = torch.rand(2, 3, 32, 32), ["A red fox.", "The sky."]
    inputs = CLIPProcessor.from_pretrained(folder)(text=prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = models[0](pixel_values=(images - 0.5) / 0.25, **inputs).logits_per_image.diag()
    for name in ("denscore", "pickscore", "clip"):
        reward = rewards.build({"name": name, "checkpoint": folder})
        assert torch.allclose(reward.score(images, prompts) * models[0].logit_scale.exp(), logits, atol=1e-4)
        assert reward.preprocessor.mean == (0.5, 0.5, 0.5) and reward.preprocessor.size == (32, 32)


def test_a_run_brings_the_loss_down(clip, tmp_path):
    loop = {"steps": 40, "batch_size": 8, "lr": 3e-3, "save_every": None, "log_every": 1, "clip": 1.0}
    data = {"name": "scene-pairs", "size": 8, "objects": [1, 2], "words": [10, 20], "captions": True}
    build_from_config(config(clip, tmp_path, loop=loop, data=data)).fit()
    found = [line["loss"] for line in lines(tmp_path)]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    assert lines(tmp_path)[-1]["agreement"] > 0.7


def test_half_precision_keeps_the_trained_weights_whole(clip, tmp_path):
    loop = {"steps": 1, "batch_size": 2, "precision": "bf16", "gradient_checkpointing": True}
    composition = build_from_config(config(clip, tmp_path, loop=loop))
    composition.fit()
    trainer = composition.trainer
    assert {p.dtype for p in trainer.trainable()} == {torch.float32}
    start = CLIPModel.from_pretrained(clip).logit_scale  # not rounded to bfloat16 when it was loaded
    assert abs(trainer.reward.towers.logit_scale - start) < 1e-4


# Configs


def problems(value):
    with pytest.raises(ConfigError) as error:
        load_config(value)
    return dict(error.value.errors)


def test_a_run_needs_no_backbone_and_no_encoder_and_says_so(clip, tmp_path):
    good = load_config(config(clip, tmp_path))
    assert good.backbone is None and good.encoder is None and load_config(to_dict(good)) == good
    with pytest.raises(ConfigError, match="backbone: this run has no backbone"):
        _ = build_from_config(good).backbone
    parts = {"backbone": {"name": "sd", "checkpoint": "mini/sd"}, "encoder": {"name": "t5"}}
    found = problems({**to_dict(good), **parts})
    assert found == {key: f"'denscore' uses no {key}; leave it out" for key in parts}
    assert problems({**config(clip, tmp_path), "trainer": "align", "rewards": []})["backbone"] == "this key is required"
    null = {**config(clip, tmp_path), **parts, "trainer": "align", "rewards": [], "data": "scenes", "backbone": None}
    assert problems(null) == {"backbone": "this key is required"}
    assert "did you mean 'denscore'" in problems({**config(clip, tmp_path), "trainer": "denscor"})["trainer.name"]


def test_what_the_trainer_does_not_use_is_refused(clip, tmp_path):
    given = {
        "validation": {"prompts": ["a"]},
        "cache": {"folder": "x"},
        "init_from": "runs/x",
        "loop": {"channels_last": True, "compile": True},
        "rewards": ["hpsv2", "clip"],
        "data": "scenes",
    }
    found = problems(config(clip, tmp_path, **given))
    assert {"validation", "cache", "init_from", "loop.channels_last", "loop.compile", "rewards", "data"} == set(found)
    assert found["rewards"] == "'denscore' trains one reward: 'denscore', 'pickscore' or 'clip'; got 'hpsv2', 'clip'"
    assert found["data"] == "'denscore' compares two images of a prompt, and 'scenes' has one; choose 'pairs'"
    parts = {"backbone": {"name": "sd", "checkpoint": "mini/sd"}, "encoder": "clip-segment"}
    found = problems({**parts, "trainer": "align", "data": "scene-pairs"})
    assert found == {
        "data": "'scene-pairs' has two images of each prompt, and 'align' does not compare them; 'denscore' does"
    }
    with pytest.raises(ValueError, match="both 0, so there is no loss"):
        DenscoreTrainerConfig(preference_weight=0, contrastive_weight=0)
    with pytest.raises(ValueError, match="trains one reward, got 0"):
        DenscoreTrainerConfig().build(Runtime())


def test_its_checkpoint_is_none_of_a_backbone(clip, tmp_path):
    result = build_from_config(config(clip, tmp_path, loop={"steps": 1, "batch_size": 2})).fit()
    assert load_config(result.checkpoint).trainer == DenscoreTrainerConfig()
    with pytest.raises(ValueError, match=r"trained a reward, which is in .*/reward; expected a checkpoint"):
        load_weights(result.checkpoint)
    with pytest.raises(ValueError, match="trained a reward, and has no backbone to sample with"):
        load_for_sampling(result.checkpoint)

    # an export of it is the reward itself, with a card
    out = tmp_path / "export"
    written = {path.name for path in export(result.checkpoint, out, license="mit")}
    assert {"longalign.safetensors", "model.safetensors", "config.json", "tokenizer.json", "README.md"} <= written
    saved, exported = (
        rewards.build({"name": "denscore", "checkpoint": str(folder)}).text_features([TWO])
        for folder in (result.checkpoint / "reward", out)
    )
    assert torch.equal(saved, exported)
    card = (out / "README.md").read_text()
    assert "library_name: transformers\n" in card and "license: mit\n" in card and "for 1 step" in card
    for again in (result.checkpoint, out):
        with pytest.raises(ValueError, match=r"exists; choose another folder|is this an export already"):
            export(again, out if again != out else tmp_path / "other")
