"""transformers 4 and 5 give the same values; the expected ones are from version 5."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from longalign.registry import encoders, rewards
from longalign.testing import tiny
from longalign.testing.tiny import weights_of

PROMPTS = ["A red fox sleeps on a wall. The sky is green.", "The sky. A wall."]


def spread(shape, start=0):
    """Pseudo-random values in [0, 1), identical on every machine."""
    steps = torch.arange(start, start + math.prod(shape), dtype=torch.float64)
    return ((0.381966 * steps**2) % 1).float().view(shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP with deterministic weights, under the published names."""
    folder = tiny.tiny_clip(tmp_path_factory.mktemp("known"))
    weights = weights_of(folder / "model.safetensors")
    for i, name in enumerate(sorted(weights)):
        weights[name] = spread(weights[name].shape, 1000 * i) - 0.5 + ("norm" in name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def images():
    return spread((2, 3, 40, 48))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", [-0.1126474, 0.0415241]),
        ("pickscore", [-0.1126474, 0.0415241]),
        ("denscore", [-0.0112935, 0.0530534]),
    ],
)
def test_reward_scores_match_transformers_5(folder, name, expected):
    reward = rewards.build({"name": name, "checkpoint": folder})
    assert reward.score(images(), PROMPTS).tolist() == pytest.approx(expected, abs=1e-6)


def test_reward_gradient_matches_transformers_5(folder):
    reward, pixels = rewards.build({"name": "denscore", "checkpoint": folder}), images().requires_grad_()
    reward.score(pixels, PROMPTS).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.norm().item() == pytest.approx(0.3071157, abs=1e-5)
    assert pixels.grad[1, 2, 20, 20:23].tolist() == pytest.approx([-0.0064002, -0.0001066, 0.0070645], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("clip-segment", [2.033442, 1.922464, 112.7988]), ("clip-truncate", [2.033442, 2.059202, 66.34303])],
)
def test_text_states_match_transformers_5(folder, name, expected):
    states = encoders.build({"name": name, "checkpoint": folder}).encode(PROMPTS).states
    assert [states[0, 7, 3].item(), states[1, 5, 2].item(), states.norm().item()] == pytest.approx(expected, rel=1e-5)


def test_text_encoder_loads_either_weight_naming(tmp_path):
    folder = tiny.tiny_clip_text(tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    bare = {name.removeprefix("text_model."): value for name, value in weights_of(file).items()}
    states = []
    for prefix in ("", "text_model."):
        save_file({prefix + name: value for name, value in bare.items()}, file, {"format": "pt"})
        states.append(encoders.build({"name": "clip-segment", "checkpoint": str(folder)}).encode(PROMPTS).states)
    assert torch.equal(*states)
    assert states[0].std() > 0.1


def test_tokenizer_loads_either_special_token_format(tmp_path):
    folder = tiny.tiny_t5(tmp_path)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    ids = []
    for extra in ({}, {"extra_special_tokens": [f"<extra_id_{i}>" for i in range(100)]}):
        config.write_text(json.dumps({**settings, **extra}))
        ids.append(encoders.build({"name": "t5", "checkpoint": str(folder)}).tokens("a fox <extra_id_7>").ids)
    assert ids[0] == ids[1]
    # special tokens in a prompt are split as plain text
    special = encoders.build({"name": "t5", "checkpoint": str(folder)}).tokens.tokenizer.convert_tokens_to_ids
    assert special("<extra_id_7>") not in ids[0] and len(ids[0]) > len("a fox ")
