import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from longalign.registry import ConfigError, rewards
from safetensors.torch import load, save_file

from longalign_siglip.config import SiglipConfig
from longalign_siglip.towers import SiglipTowers

TWO = "A red fox sleeps. The sky is green."


@pytest.fixture(scope="module")
def siglip(checkpoint):
    return rewards.build({"name": "siglip", "checkpoint": checkpoint})


def test_entry_point_is_discovered():
    assert rewards.get("siglip") is SiglipConfig
    assert rewards.info("siglip").owner.startswith("longalign-siglip 0.1")


def test_config_imports_no_torch():
    code = "import sys, longalign.registry as r; r.rewards.validate('siglip'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_score_is_unscaled_cosine(siglip):
    images, prompts = torch.rand(2, 3, 32, 32), ["a red fox", "the sky"]
    model, tokenizer = siglip.towers.model, siglip.towers.tokenizer
    tokens = tokenizer(prompts, padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens["input_ids"], pixel_values=images * 2 - 1)
    cosine = (output.image_embeds * output.text_embeds).sum(-1)
    scores = siglip.score(images, prompts)
    assert torch.allclose(scores, cosine, atol=1e-6)
    logits = output.logits_per_image.diag()
    assert torch.allclose(scores * model.logit_scale.exp() + model.logit_bias, logits, atol=1e-4)


def test_text_features_pad_every_batch_to_window(siglip, monkeypatch):
    lengths, features = [], siglip.towers.model.get_text_features
    monkeypatch.setattr(
        siglip.towers.model,
        "get_text_features",
        lambda input_ids: lengths.append(input_ids.shape) or features(input_ids),
    )
    mixed = siglip.text_features(["a", "the sky is green " * 10])
    assert torch.allclose(siglip.text_features(["a"]), mixed[:1], atol=1e-6)
    assert lengths == [(2, 64), (1, 64)]


@pytest.mark.parametrize("shape", [(32, 32), (48, 20), (100, 100)])
def test_gradient_reaches_images_only_at_any_resolution(siglip, shape):
    images = torch.rand(2, 3, *shape, requires_grad=True)
    siglip.score(images, ["a red fox", "the sky"]).sum().backward()
    assert images.grad is not None
    assert all((images.grad[i] != 0).any() for i in range(2))
    assert all(p.grad is None and not p.requires_grad for p in siglip.parameters())


def test_non_square_images_are_squashed_as_in_processor(siglip):
    wide = torch.rand(1, 3, 32, 64)
    squashed = torch.nn.functional.interpolate(wide, (32, 32), mode="bicubic", antialias=True)
    assert torch.allclose(siglip.score(wide, ["fox"]), siglip.score(squashed, ["fox"]), atol=1e-6)


def test_long_prompts_by_text_setting(siglip, checkpoint):
    assert siglip.towers.window == 63
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        siglip.text_features(["sky " * 63])
        assert not torch.allclose(*siglip.text_features(["sky " * 64 + "fox", "sky " * 64 + "red"]), atol=1e-4)
    whole = rewards.build({"name": "siglip", "checkpoint": checkpoint, "text": "whole"})
    with pytest.warns(UserWarning, match=r"64 tokens.* 63.*text: auto"):
        whole.text_features(["sky " * 64])
    segments = rewards.build({"name": "siglip", "checkpoint": checkpoint, "text": "segments"})
    first, second, both = segments.text_features(["A red fox sleeps.", "The sky is green.", TWO])
    assert torch.allclose(both, (first + second) / 2, atol=1e-6)


def test_reweighted_siglip_equals_plain_score_at_omega_one(checkpoint):
    config = {"name": "reweighted", "omega": 1.0, "inner": {"name": "siglip", "checkpoint": checkpoint}}
    reward = rewards.build(config)
    images, prompts = torch.rand(2, 3, 32, 32), ["a red fox", "the sky"]
    scores = reward.score_components(images, prompts)
    assert torch.allclose(scores.total, reward.inner.score(images, prompts), atol=1e-6)
    assert torch.allclose(scores.parts["text_relevant"] + scores.parts["text_irrelevant"], scores.total, atol=1e-6)


def test_image_settings_from_checkpoint(siglip):
    assert isinstance(siglip.towers, SiglipTowers)
    assert (siglip.preprocessor.size, siglip.preprocessor.mean, siglip.preprocessor.std) == (
        (32, 32),
        (0.5,) * 3,
        (0.5,) * 3,
    )


def test_rejects_incomplete_model_and_wrong_keys(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "half")
    weights = {k: v for k, v in load((folder / "model.safetensors").read_bytes()).items() if k.startswith("text_model")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"SiglipModel: \d+ weights"):
        rewards.build({"name": "siglip", "checkpoint": str(folder)})
    with pytest.raises(ConfigError, match=r"chekpoint: .*did you mean 'checkpoint'"):
        rewards.validate({"name": "siglip", "chekpoint": "x"})


def test_config_round_trip():
    config = rewards.validate({"name": "siglip", "text": "segments"})
    assert rewards.validate(json.loads(config.model_dump_json())) == config
