"""The `mini` weights load through the same parts as published ones and perform well enough."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from longalign.inference.sampling import sample
from longalign.mini import oracle
from longalign.mini.captions import Caption, describe
from longalign.mini.scenes import ATTRIBUTES, VALUES, Scene, render_batch, sample_scene
from longalign.registry import backbones, encoders, rewards

WEIGHTS = Path(str(resources.files("longalign.mini"))) / "weights"
LONG = "There is a circle in the top left. " * 40


def sample_scenes(count: int, things: tuple[int, int], words: int) -> tuple[list[Scene], list[Caption]]:
    scenes = [sample_scene(np.random.default_rng([31, i]), things) for i in range(count)]
    return scenes, [describe(s, np.random.default_rng([32, i]), words=words) for i, s in enumerate(scenes)]


def change_facts(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute of every object changed."""
    things = []
    for thing in scene.things:
        attribute = ATTRIBUTES[int(rng.integers(4))]
        others = [v for v in VALUES[attribute] if v != getattr(thing, attribute)]
        things.append(type(thing)(**{**vars(thing), attribute: others[int(rng.integers(len(others)))]}))
    return Scene(tuple(things), scene.ground, scene.tint, scene.vignette)


def test_mini_weights_are_float16_and_below_40_mib():
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 40 * 2**20
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert {f.parent.name for f in weights} >= {"unet", "vae", "text_encoder", "clip", "longclip", "t5", "denscore"}
    for file in weights:
        with safe_open(file, "pt") as tensors:
            assert {str(tensors.get_slice(k).get_dtype()) for k in tensors.keys()} <= {"F16", "I64"}, file  # noqa: SIM118


def test_mini_text_encoder_has_published_weight_names():
    with safe_open(WEIGHTS / "sd" / "text_encoder" / "model.safetensors", "pt") as tensors:
        assert all(name.startswith("text_model.") for name in tensors.keys())  # noqa: SIM118


def test_mini_vae_preserves_facts():
    scenes, captions = sample_scenes(40, (1, 9), 100)
    backbone = backbones.build({"name": "sd", "checkpoint": "mini/sd"})
    with torch.no_grad():
        images = backbone.decode(backbone.encode_images(torch.from_numpy(render_batch(scenes))))
    assert oracle.fact_accuracy(images.numpy(), captions).mean() >= 0.95


def test_mini_unet_generates_short_captions():
    _, captions = sample_scenes(24, (1, 2), 20)
    backbone = backbones.build({"name": "sd", "checkpoint": "mini/sd"})
    encoder = encoders.build({"name": "clip-truncate", "checkpoint": "mini/sd"})
    texts = [c.text for c in captions]
    images = sample(backbone, encoder, texts, num_steps=12, guidance=4.0, seeds=list(range(24)), batch_size=24)
    shuffled = oracle.fact_accuracy(images.numpy(), captions[1:] + captions[:1]).mean()
    assert oracle.fact_accuracy(images.numpy(), captions).mean() >= shuffled + 0.3


@pytest.mark.parametrize(
    "config",
    [
        {"name": "clip-segment", "checkpoint": "mini/sd", "overflow": "grow"},
        {"name": "longclip", "checkpoint": "mini/longclip", "overflow": "truncate"},
        {"name": "t5", "checkpoint": "mini/t5", "overflow": "grow"},
    ],
    ids=lambda config: config["name"],
)
def test_mini_encoders_encode_more_than_one_window(config: dict[str, object]):
    encoder = encoders.build(config)
    (report,) = encoder.report([LONG[:600]])
    assert report.truncated == ""
    assert sum(report.tokens) > 77
    states = encoder.encode([LONG[:600]]).states
    assert states.isfinite().all()
    assert states.shape[-1] == encoder.dim


@pytest.mark.parametrize(
    ("name", "words", "accuracy"),
    [("clip", 20, 0.7), ("pickscore", 20, 0.7), ("hpsv2", 20, 0.7), ("denscore", 80, 0.8)],
)
def test_mini_rewards_prefer_the_described_image(name: str, words: int, accuracy: float):
    scenes, captions = sample_scenes(60, (1, 3), words)
    reward = rewards.build({"name": name, "checkpoint": f"mini/{name}"})
    texts = [c.text for c in captions]
    rng = np.random.default_rng(0)
    with torch.no_grad():
        true = reward.score(torch.from_numpy(render_batch(scenes)), texts)
        false = reward.score(torch.from_numpy(render_batch([change_facts(s, rng) for s in scenes])), texts)
    assert (true > false).float().mean() >= accuracy


def test_reweighted_mini_denscore_scales_the_irrelevant_part():
    scenes, captions = sample_scenes(24, (1, 4), 80)
    config = {"name": "reweighted", "omega": 0.3, "inner": {"name": "denscore", "checkpoint": "mini/denscore"}}
    reward = rewards.build(config)
    with torch.no_grad():
        scores = reward.score_components(torch.from_numpy(render_batch(scenes)), [c.text for c in captions])
    relevant, irrelevant = scores.parts["text_relevant"], scores.parts["text_irrelevant"]
    torch.testing.assert_close(scores.total, relevant + 0.3 * irrelevant)
    # the two parts add up to the plain reward
    plain = rewards.build(config["inner"])
    with torch.no_grad():
        expected = plain.score(torch.from_numpy(render_batch(scenes)), [c.text for c in captions])
    torch.testing.assert_close(relevant + irrelevant, expected)


@pytest.mark.parametrize(("name", "words", "ratio"), [("denscore", 80, 3), ("pickscore", 25, 1), ("hpsv2", 25, 1)])
def test_mini_preference_parts_separate_truth_and_taste(name: str, words: int, ratio: float):
    scenes, captions = sample_scenes(60, (1, 4), words)
    rng = np.random.default_rng(1)
    changed = {
        "true": [Scene(s.things, s.ground, 0.0, 0.5) for s in scenes],
        "false": [change_facts(Scene(s.things, s.ground, 0.0, 0.5), rng) for s in scenes],
        "plain": [Scene(s.things, s.ground, -0.8, 0.1) for s in scenes],
        "pleasing": [Scene(s.things, s.ground, 0.8, 0.9) for s in scenes],
    }
    inner = {"name": name, "checkpoint": f"mini/{name}"}
    reward = rewards.build({"name": "reweighted", "omega": 0.3, "direction": "batch", "inner": inner})
    texts = [c.text for c in captions]
    with torch.no_grad():
        parts = {k: reward.score_components(torch.from_numpy(render_batch(v)), texts).parts for k, v in changed.items()}
    by_truth = {p: parts["true"][p] - parts["false"][p] for p in ("text_relevant", "text_irrelevant")}
    by_taste = {p: parts["pleasing"][p] - parts["plain"][p] for p in ("text_relevant", "text_irrelevant")}
    assert (by_truth["text_relevant"] > 0).float().mean() >= 0.8
    assert (by_taste["text_irrelevant"] > 0).float().mean() >= 0.95
    assert by_truth["text_relevant"].mean() > ratio * by_truth["text_irrelevant"].mean().abs()
    assert by_taste["text_irrelevant"].mean() > ratio * by_taste["text_relevant"].mean().abs()
