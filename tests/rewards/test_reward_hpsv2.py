import json
import shutil
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from longalign.registry import ConfigError, rewards
from longalign.rewards.hpsv2.weights import build_model, find_weights, read_state
from longalign.testing import tiny


@pytest.fixture(scope="module")
def hpsv2(hpsv2_folder):
    return rewards.build({"name": "hpsv2", "checkpoint": hpsv2_folder})


def test_hpsv2_score_is_unscaled_cosine(hpsv2, hpsv2_folder):
    images, prompts = torch.rand(2, 3, 32, 32), ["a red fox", "the sky"]
    folder = Path(hpsv2_folder)
    settings = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.model.CLIP(**settings["model_cfg"]).eval()
    model.load_state_dict(torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    tokens = SimpleTokenizer(str(folder / "bpe_simple_vocab.txt.gz"))(prompts)
    with torch.no_grad():
        image, text = model.encode_image((images - 0.5) / 0.25), model.encode_text(tokens)
    assert torch.allclose(hpsv2.score(images, prompts), torch.cosine_similarity(image, text), atol=1e-6)


def test_hpsv2_gradient_reaches_images_only(hpsv2):
    images = torch.rand(2, 3, 20, 50, requires_grad=True)
    hpsv2.score(images, ["a red fox", "the sky"]).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).any()
    assert all(p.grad is None and not p.requires_grad for p in hpsv2.parameters())


def test_hpsv2_pads_non_square_images(hpsv2):
    image = torch.rand(1, 3, 16, 32)
    square = torch.cat([torch.zeros(1, 3, 8, 32), image, torch.zeros(1, 3, 8, 32)], 2)
    assert torch.allclose(hpsv2.score(image, ["fox"]), hpsv2.score(square, ["fox"]), atol=1e-6)


def test_hpsv2_file_uses_config_in_its_folder(hpsv2, hpsv2_folder):
    file = rewards.build({"name": "hpsv2", "checkpoint": f"{hpsv2_folder}/HPS_v2.1_compressed.pt"})
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(file.score(images, ["fox"]), hpsv2.score(images, ["fox"]))


def test_find_weights_version_selects_file(tmp_path):
    tiny.tiny_hpsv2(tmp_path, "HPS_v2_compressed.pt")
    assert find_weights(str(tmp_path), "v2") == tmp_path / "HPS_v2_compressed.pt"
    with pytest.raises(ValueError, match=r"HPS_v2\.1_compressed\.pt.* HPS_v2_compressed\.pt.*`version`"):
        find_weights(str(tmp_path))
    with pytest.raises(ValueError, match=r"`version` .*HPS_v2_compressed\.pt"):
        find_weights(str(tmp_path / "HPS_v2_compressed.pt"), "v2")
    with pytest.raises(ValueError, match=r"`revision` .*local"):
        find_weights(str(tmp_path), "v2", "main")
    with pytest.raises(ValueError, match=r"no file .*missing\.pt"):
        find_weights(str(tmp_path / "missing.pt"))
    with pytest.raises(ConfigError, match="version"):
        rewards.validate({"name": "hpsv2", "version": "v3"})


def test_find_weights_downloads_version_from_hub(monkeypatch):
    downloads = []

    def download(repo, name, revision=None):
        downloads.append((repo, name, revision))
        return f"/cache/{name}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_weights("xswu/HPSv2") == Path("/cache/HPS_v2.1_compressed.pt")
    assert find_weights("xswu/HPSv2", "v2", "abc") == Path("/cache/HPS_v2_compressed.pt")
    assert downloads == [
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt", None),
        ("xswu/HPSv2", "HPS_v2_compressed.pt", "abc"),
    ]


def test_hpsv2_default_architecture_is_vit_h_14(hpsv2_folder, tmp_path, monkeypatch):
    shutil.copy(f"{hpsv2_folder}/HPS_v2.1_compressed.pt", tmp_path)
    configs = []

    class Stop(Exception):
        pass

    def build(model_cfg, state, origin):
        configs.append(model_cfg)
        raise Stop

    monkeypatch.setattr("longalign.rewards.hpsv2.reward.build_model", build)
    with pytest.raises(Stop):
        rewards.build({"name": "hpsv2", "checkpoint": str(tmp_path)})
    assert configs == [open_clip.get_model_config("ViT-H-14")]
    assert configs[0]["embed_dim"] == 1024


def test_build_model_rejects_weights_of_different_architecture(hpsv2_folder):
    folder = Path(hpsv2_folder)
    settings = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    state = read_state(folder / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"(?s)'here'.*'embed_dim': 8.*open_clip_config\.json"):
        build_model({**settings, "embed_dim": 8}, state, "here")


def test_read_state_rejects_other_content(tmp_path):
    torch.save({"weights": {}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"under 'state_dict'.*\['weights'\]"):
        read_state(tmp_path / "a.pt")
    torch.save({"state_dict": {}, "code": Path("a")}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt.*'pathlib"):
        read_state(tmp_path / "b.pt")


def test_hpsv2_whole_warns_above_window(hpsv2_folder):
    hpsv2 = rewards.build({"name": "hpsv2", "checkpoint": hpsv2_folder, "text": "whole"})
    assert hpsv2.towers.count_tokens("a " * 75) == 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled = hpsv2.text_features(["a " * 74 + "fox"])
    with pytest.warns(UserWarning, match="76 tokens"):
        longer = hpsv2.text_features(["a " * 74 + "fox sky"])
    assert torch.allclose(filled, longer, atol=1e-6)


def test_hpsv2_text_segments_is_mean(hpsv2_folder):
    reward = rewards.build({"name": "hpsv2", "checkpoint": hpsv2_folder, "text": "segments"})
    first, second, both = reward.text_features(["A fox.", "The sky.", "A fox. The sky."])
    assert torch.allclose(both, (first + second) / 2, atol=1e-6)
