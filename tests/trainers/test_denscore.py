"""Training a CLIP on preference pairs: losses, trainable parameters, several processes, runs and checkpoints."""

import json
import math
import re
from threading import Barrier, Thread

import pytest
import torch
import worlds
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from longalign import build_from_config, fit, load_config
from longalign.checkpoints.checkpoint import load_for_sampling, load_weights
from longalign.checkpoints.publish import export
from longalign.config.run import to_dict
from longalign.errors import ConfigError
from longalign.registry import rewards
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_clip
from longalign.trainers.denscore.config import DenscoreTrainerConfig
from longalign.trainers.denscore.trainer import DenscoreTrainer, divergence, pairwise_accuracy

TWO = "A red fox sleeps on a wall. The sky is green."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(tiny_clip(tmp_path_factory.mktemp("clip"), width=8))


def build(clip, runtime=None, reward_keys=None, **settings):
    reward = rewards.build({"name": "denscore", "checkpoint": clip, **(reward_keys or {})})
    config = DenscoreTrainerConfig(**settings)
    return DenscoreTrainer.from_config(config, runtime or Runtime(), rewards=[reward]).train()


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


def features(trainer, inputs):
    """Reference: unit embeddings of images (b, 2, d), of each prompt's segments, and their means (b, d)."""
    images = F.normalize(trainer.reward.towers.embed_pixels((inputs["image"].flatten(0, 1) - 0.5) / 0.25), dim=-1)
    segments = [
        F.normalize(trainer.reward.towers.embed_texts([s.strip(" .") + "." for s in p.split(".") if s]), dim=-1)
        for p in inputs["prompt"]
    ]
    return images.view(len(segments), 2, -1), segments, torch.stack([s.mean(0) for s in segments])


# The losses


def test_divergence_equals_manual_kl():
    target = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    logits = torch.tensor([[math.log(0.25), math.log(0.75)], [0.0, 0.0]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(logits, target).item() == pytest.approx((expected + math.log(2)) / 2, abs=1e-6)
    assert divergence(torch.tensor([[3.0, 3.0]]), target[:1]).item() == pytest.approx(0, abs=1e-6)


def test_pairwise_accuracy_counts_ties_half():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert pairwise_accuracy(scores, torch.tensor([0.9, 0.1, 0.0, 0.5])).item() == (1 + 0 + 1 + 0.5) / 4


def test_losses_and_metrics_match_reward_scores(clip):
    trainer, inputs = build(clip, contrastive_weight=2.0), batch()
    out = trainer.loss(inputs)
    images, segments, text = features(trainer, inputs)
    scale = trainer.reward.towers.logit_scale.exp()
    scores = scale * (images * text[:, None]).sum(-1)
    for i in range(2):
        reward_score = trainer.reward.score(inputs["image"][:, i], inputs["prompt"])
        assert torch.allclose(scores[:, i], scale * reward_score, atol=1e-4)
    p = inputs["preference"]
    log = scores.log_softmax(-1)
    expected = torch.special.entr(p) + torch.special.entr(1 - p) + p * log[:, 0] + (1 - p) * log[:, 1]
    assert torch.allclose(out["preference_loss"], -expected.mean(), atol=1e-5)

    rows = []
    for i, embeddings in enumerate(segments):
        for segment in embeddings:
            log = (scale * images.flatten(0, 1) @ segment).log_softmax(0)
            target = torch.stack([p[i], 1 - p[i]])
            rows.append(-(torch.special.entr(target) + target * log[2 * i : 2 * i + 2]).sum())
    assert len(rows) == 2 + 3 + 1
    assert torch.allclose(out["contrastive_loss"], 2 * torch.stack(rows).mean(), atol=1e-5)

    preferred = torch.stack([images[0, 0], images[1, 1], images[2, 0]])
    assert out["r_at_1"] == ((text @ preferred.T).argmax(1) == torch.arange(3)).float().mean()
    hits = [(embeddings @ preferred.T).argmax(1) == i for i, embeddings in enumerate(segments)]
    assert out["segment_r_at_1"] == torch.cat(hits).float().mean()
    common = F.normalize(text.mean(0), dim=0)
    assert torch.allclose(out["eta"], (text @ common).mean(), atol=1e-6)
    assert out["scale"] == scale and not out["scale"].requires_grad


def test_contrastive_loss_of_captions_targets_their_own_image(clip):
    trainer, inputs = build(clip, preference_weight=0.0, contrastive_weight=1.0), batch(2, captions=True)
    out = trainer.loss(inputs)
    assert "preference_loss" not in out
    images = features(trainer, inputs)[0].flatten(0, 1)
    texts = [text for pair in inputs["captions"] for text in pair]
    texts_of_segment = {  # indices of the texts that contain each segment; a text may contain it twice
        "A red fox sleeps on a wall.": [0], "The sky is green.": [0], "A wall.": [0, 2, 2], "Green.": [1, 3],
        "Red.": [1, 3], "Sky.": [1, 3], "The sky.": [2], "A fox.": [2],
    }  # fmt: skip
    rows = []
    for segment, indices in texts_of_segment.items():
        (embedding,), _ = trainer.reward.segment_features([segment])
        log = (trainer.reward.towers.logit_scale.exp() * images @ embedding).log_softmax(0)
        target = torch.bincount(torch.tensor(indices), minlength=4) / len(indices)
        rows += [(torch.special.entr(target).neg() - target * log).sum()] * len(indices)
    assert len(rows) == 3 + 3 + 4 + 3
    assert torch.allclose(out["contrastive_loss"], torch.stack(rows).mean(), atol=1e-5)
    text = trainer.reward.text_features(texts)
    assert out["r_at_1"] == ((text @ images.T).argmax(1) == torch.arange(4)).float().mean()
    # the preference has no effect
    other = {**inputs, "preference": 1 - inputs["preference"]}
    assert torch.equal(trainer.loss(other)["contrastive_loss"], out["contrastive_loss"])


def test_losses_depend_on_text_beyond_the_token_window(clip):
    trainer, inputs = build(clip), batch(2)
    losses = []
    for end in ("fox", "sky"):
        inputs["prompt"][0] = "a " * 80 + end
        losses.append(trainer.loss(inputs)["preference_loss"].item())
    assert losses[0] != losses[1]


# Trainable parameters


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("all", {"text_model", "text_projection", "vision_model", "visual_projection", "logit_scale"}),
        ("text", {"text_model", "text_projection", "logit_scale"}),
        ("vision", {"vision_model", "visual_projection", "logit_scale"}),
        ("projections", {"text_projection", "visual_projection", "logit_scale"}),
    ],
)
def test_train_setting_selects_parameters_with_gradient(clip, train, expected):
    trainer = build(clip, train=train)
    trainer.step(batch(captions=True), torch.Tensor.backward)
    model = trainer.reward.towers.model
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in graded} == expected
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in trainer.trainable()]
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


def test_micro_batch_and_checkpointing_keep_gradient(clip):
    gradients = []
    for reward_keys, checkpointing in (({}, False), ({"micro_batch": 4}, False), ({}, True)):
        trainer = build(clip, reward_keys=reward_keys)
        if checkpointing:
            trainer.enable_gradient_checkpointing()
        trainer.step(batch(), torch.Tensor.backward)
        gradients.append([p.grad for p in trainer.trainable()])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[0], other, strict=True))


def test_temperature_is_clamped_and_keeps_gradient(clip):
    trainer = build(clip)
    scale = trainer.reward.towers.logit_scale
    with torch.no_grad():
        scale.fill_(9.0)
    trainer.on_optimizer_step()
    assert scale.exp().item() == pytest.approx(100, rel=1e-5)
    trainer.step(batch(), torch.Tensor.backward)
    assert scale.grad != 0


def test_trainer_rejects_towers_that_cannot_be_trained():
    from longalign.rewards.towers import Towers

    reward = torch.nn.Module()
    reward.towers = Towers()
    with pytest.raises(ValueError, match=r"Towers\b.*CLIPModel"):
        DenscoreTrainer.from_config(DenscoreTrainerConfig(), Runtime(), rewards=[reward])


def test_step_gradient_of_two_processes_equals_one(clip):
    full_batch = batch(4, captions=True)
    single = build(clip)
    values = single.step(full_batch, torch.Tensor.backward)
    barrier, tensors = Barrier(2), [None, None]

    def gather(rank):
        def exchange(tensor):
            tensors[rank] = tensor
            barrier.wait()
            out = torch.cat(tensors)
            barrier.wait()
            return out

        return exchange

    pair = [build(clip, Runtime(gather=gather(rank), rank=rank, world_size=2)) for rank in range(2)]
    results = [None, None]

    def work(rank):
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in full_batch.items()}
        results[rank] = pair[rank].step(part, torch.Tensor.backward)

    threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for key, value in values.items():
        assert torch.allclose(results[0][key], value, atol=1e-5) and torch.allclose(
            results[1][key], value, atol=1e-5
        ), key
    for p, a, b in zip(*(t.trainable() for t in (single, *pair)), strict=True):
        assert torch.allclose(p.grad, (a.grad + b.grad) / 2, atol=1e-4 * p.grad.abs().max().item() + 1e-6)


# Runs


def lines(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_fit_resumes_exactly_and_saves_clip_loadable_by_rewards(clip, tmp_path):
    loop = {"steps": 4, "batch_size": 3, "lr": 1e-3, "save_every": 2, "log_every": 1, "ema": 0.5}
    uninterrupted = fit(config(clip, tmp_path / "uninterrupted", loop=loop))
    fit(config(clip, tmp_path / "resumed", loop={**loop, "steps": 2}))
    resumed = fit(config(clip, tmp_path / "resumed", loop=loop), resume=tmp_path / "resumed")
    assert lines(tmp_path / "uninterrupted") == lines(tmp_path / "resumed")
    row = lines(tmp_path / "uninterrupted")[0]
    losses = {"loss", "preference_loss", "contrastive_loss"}
    assert set(row) == losses | {
        "step", "agreement", "r_at_1", "segment_r_at_1", "eta", "scale", "grad_norm", "lr"
    }  # fmt: skip
    assert row["loss"] == pytest.approx(row["preference_loss"] + row["contrastive_loss"], rel=1e-6)

    models = [CLIPModel.from_pretrained(result.checkpoint / "reward") for result in (uninterrupted, resumed)]
    start = CLIPModel.from_pretrained(clip).state_dict()
    states = [model.state_dict() for model in models]
    assert states[0].keys() == start.keys() and all(torch.equal(states[0][k], states[1][k]) for k in start)
    assert not torch.equal(states[0]["text_projection.weight"], start["text_projection.weight"])
    raw = torch.load(uninterrupted.checkpoint / "resume" / "shared.pt", weights_only=True)["parameters"]
    assert not any(torch.equal(p, states[0]["text_projection.weight"]) for p in raw)  # the average is saved

    folder = str(uninterrupted.checkpoint / "reward")
    images, prompts = torch.rand(2, 3, 32, 32), ["A red fox.", "The sky."]
    inputs = CLIPProcessor.from_pretrained(folder)(text=prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = models[0](pixel_values=(images - 0.5) / 0.25, **inputs).logits_per_image.diag()
    for name in ("denscore", "pickscore", "clip"):
        reward = rewards.build({"name": name, "checkpoint": folder})
        assert torch.allclose(reward.score(images, prompts) * models[0].logit_scale.exp(), logits, atol=1e-4)
        assert reward.preprocessor.mean == (0.5, 0.5, 0.5) and reward.preprocessor.size == (32, 32)


def test_fit_reduces_loss(clip, tmp_path):
    loop = {"steps": 40, "batch_size": 8, "lr": 3e-3, "save_every": None, "log_every": 1, "clip": 1.0}
    data = {"name": "scene-pairs", "size": 8, "objects": [1, 2], "words": [10, 20], "captions": True}
    fit(config(clip, tmp_path, loop=loop, data=data))
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert lines(tmp_path)[-1]["agreement"] > 0.7


def test_bf16_keeps_trainable_weights_in_float32(clip, tmp_path):
    loop = {"steps": 1, "batch_size": 2, "precision": "bf16", "gradient_checkpointing": True}
    trainer = worlds.finished(config(clip, tmp_path, loop=loop)).composition.trainer
    assert {p.dtype for p in trainer.trainable()} == {torch.float32}
    start = CLIPModel.from_pretrained(clip).logit_scale  # not rounded to bfloat16
    assert abs(trainer.reward.towers.logit_scale - start) < 1e-4


# Configs


def problems(value):
    with pytest.raises(ConfigError) as error:
        load_config(value)
    return dict(error.value.errors)


def test_config_rejects_backbone_and_encoder(clip, tmp_path):
    valid = load_config(config(clip, tmp_path))
    assert valid.backbone is None and valid.encoder is None and load_config(to_dict(valid)) == valid
    with pytest.raises(ConfigError, match="backbone: "):
        _ = build_from_config(valid).backbone
    parts = {"backbone": {"name": "sd", "checkpoint": "mini/sd"}, "encoder": {"name": "t5"}}
    messages = problems({**to_dict(valid), **parts})
    assert messages.keys() == parts.keys()
    assert all("'denscore'" in message and key in message for key, message in messages.items())
    assert "required" in problems({**config(clip, tmp_path), "trainer": "align", "rewards": []})["backbone"]
    null = {**config(clip, tmp_path), **parts, "trainer": "align", "rewards": [], "data": "scenes", "backbone": None}
    messages = problems(null)
    assert messages.keys() == {"backbone"} and "required" in messages["backbone"]
    assert "'denscore'" in problems({**config(clip, tmp_path), "trainer": "denscor"})["trainer.name"]


def test_config_rejects_unused_keys(clip, tmp_path):
    unused = {
        "monitor": {"prompts": ["a"]},
        "cache": {"folder": "x"},
        "init_from": "runs/x",
        "loop": {"channels_last": True, "compile": True, "cuda_graphs": True},
        "rewards": ["hpsv2", "clip"],
        "data": "scenes",
    }
    messages = problems(config(clip, tmp_path, **unused))
    keys = {
        "monitor",
        "cache",
        "init_from",
        "loop.channels_last",
        "loop.compile",
        "loop.cuda_graphs",
        "rewards",
        "data",
    }
    assert messages.keys() == keys
    assert re.search("'denscore'.*'pickscore' or 'clip'.*got 'hpsv2', 'clip'", messages["rewards"])
    assert re.search("'denscore'.*'scenes'.*'pairs'", messages["data"])
    parts = {"backbone": {"name": "sd", "checkpoint": "mini/sd"}, "encoder": "clip-segment"}
    messages = problems({**parts, "trainer": "align", "data": "scene-pairs"})
    assert messages.keys() == {"data"} and re.search("'scene-pairs'.*'align'.*'denscore'", messages["data"])
    with pytest.raises(ValueError, match=r"preference_weight and contrastive_weight.*\b0\b"):
        DenscoreTrainerConfig(preference_weight=0, contrastive_weight=0)
    with pytest.raises(ValueError, match=r"'denscore'.*one reward.*got 0"):
        DenscoreTrainerConfig().build(Runtime(), rewards=[])


def test_checkpoint_is_rejected_for_sampling_and_can_be_exported(clip, tmp_path):
    result = fit(config(clip, tmp_path, loop={"steps": 1, "batch_size": 2}))
    assert load_config(result.checkpoint).trainer == DenscoreTrainerConfig()
    with pytest.raises(ValueError, match=f"{result.checkpoint}.*/reward"):
        load_weights(result.checkpoint)
    with pytest.raises(ValueError, match=f"{result.checkpoint}.*backbone"):
        load_for_sampling(result.checkpoint)

    # the export is the reward itself, with a model card
    out = tmp_path / "export"
    files = {path.name for path in export(result.checkpoint, out, license="mit")}
    assert {"longalign.safetensors", "model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    saved, exported = (
        rewards.build({"name": "denscore", "checkpoint": str(folder)}).text_features([TWO])
        for folder in (result.checkpoint / "reward", out)
    )
    assert torch.equal(saved, exported)
    card = (out / "README.md").read_text()
    assert "library_name: transformers\n" in card and "license: mit\n" in card and "for 1 step" in card
    for source, target in ((result.checkpoint, out), (out, tmp_path / "other")):
        with pytest.raises(ValueError, match=str(out)):
            export(source, target)
