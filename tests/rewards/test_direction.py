import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longalign.registry import rewards
from longalign.rewards.reweighted import direction as direction_module
from longalign.rewards.reweighted.direction import compute_direction, load_direction, write_direction
from longalign.testing import tiny

PROMPTS = ["A red fox sleeps. The sky is green.", "A wall.", "The sky is red. A fox sleeps on a wall.", "A green fox."]


@pytest.fixture(scope="module")
def inner(clip_folder):
    return {"name": "denscore", "checkpoint": clip_folder}


@pytest.fixture(scope="module")
def direction_file(inner, tmp_path_factory):
    path = tmp_path_factory.mktemp("direction") / "new" / "V.safetensors"
    write_direction(inner, PROMPTS, path, batch_size=3)
    return path


def test_compute_direction_values(known):
    direction = compute_direction(known, iter(["up", "down", "up", "down"]), batch_size=3)
    assert torch.allclose(direction.vector, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert direction.num_prompts == 4
    assert direction.eta["mean"] == pytest.approx(0.6)
    assert direction.eta["std"] == pytest.approx(0.0, abs=1e-6)


def test_compute_direction_eta_distribution(known):
    direction = compute_direction(known, ["along", "up", "down"])
    assert direction.eta["quantiles"]["0.0"] == pytest.approx(0.6)
    assert direction.eta["quantiles"]["0.5"] == pytest.approx(0.6)
    assert direction.eta["quantiles"]["1.0"] == pytest.approx(1.0)
    assert (direction.eta["counts"][0], direction.eta["counts"][-1], sum(direction.eta["counts"])) == (2, 1, 3)
    report = direction.report()
    assert len(direction.eta["counts"]) == 2  # bins, for three prompts
    assert "common direction of 3 prompts, width 3" in report
    assert "mean 0.7333" in report
    assert "100% 1.0000" in report


def test_compute_direction_large_corpus_samples_eta(known, monkeypatch):
    monkeypatch.setattr(direction_module, "NUM_SAMPLED", 8)
    direction = compute_direction(known, ["up", "down", "along"] * 10, batch_size=7)
    assert torch.allclose(direction.vector, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert (direction.num_prompts, direction.eta["num_prompts"], sum(direction.eta["counts"])) == (30, 8, 8)
    assert "eta of 8 of them" in direction.report()


def test_compute_direction_independent_of_batch_size(inner):
    reward = rewards.build(inner)
    one, all_at_once = (compute_direction(reward, PROMPTS, size).vector for size in (1, 4))
    assert torch.allclose(one, all_at_once, atol=1e-6)
    batch = rewards.build({"name": "reweighted", "inner": inner})
    assert torch.allclose(one, batch.direction(reward.text_features(PROMPTS)), atol=1e-6)


def test_direction_file_is_self_describing(direction_file, inner):
    with safe_open(direction_file, "pt") as file:
        assert file.get_slice("V").get_shape() == [16]
        metadata = file.metadata()
    assert json.loads(metadata["inner"])["checkpoint"] == inner["checkpoint"]
    assert json.loads(metadata["inner"])["segmenter"] == {"name": "sentence"}
    assert json.loads(metadata["num_prompts"]) == 4
    assert set(json.loads(metadata["eta"])) == {"num_prompts", "mean", "std", "quantiles", "edges", "counts"}
    loaded = load_direction(direction_file)
    assert torch.allclose(loaded.vector.norm(), torch.tensor(1.0))
    assert "name denscore" in loaded.report()


def test_reweighted_with_direction_file_scores_batch_of_one(direction_file, inner):
    reward = rewards.build({"name": "reweighted", "direction": str(direction_file), "omega": 0.0, "inner": inner})
    image = torch.rand(1, 3, 32, 32)
    single = reward.score(image, PROMPTS[:1])
    assert torch.allclose(single, reward.score(image.repeat(2, 1, 1, 1), PROMPTS[:2])[:1], atol=1e-6)
    vector = load_direction(direction_file).vector
    text = reward.inner.text_features(PROMPTS[:1])
    perpendicular = text - (text @ vector)[:, None] * vector
    assert torch.allclose(single, (reward.inner.image_features(image) * perpendicular).sum(-1), atol=1e-6)


def test_write_direction_accepts_reweighted_config(direction_file, inner, tmp_path):
    config = {"name": "reweighted", "direction": "running", "inner": inner}
    direction = write_direction(config, PROMPTS, tmp_path / "V.safetensors")
    assert torch.allclose(direction.vector, load_direction(direction_file).vector, atol=1e-6)


def test_direction_file_independent_of_image_settings(direction_file, inner):
    changed = {**inner, "crop": 24, "micro_batch": 1}
    assert rewards.build({"name": "reweighted", "direction": str(direction_file), "inner": changed}).mode == "fixed"


def test_direction_file_rejects_different_width(direction_file, tmp_path):
    other = {"name": "denscore", "checkpoint": str(tiny.tiny_clip(tmp_path, width=8))}
    with pytest.raises(ValueError, match=r"width 16, .*name denscore.*width 8"):
        rewards.build({"name": "reweighted", "direction": str(direction_file), "inner": other})


def test_direction_file_rejects_different_weights_or_segments(direction_file, inner, tmp_path):
    other = {"name": "denscore", "checkpoint": str(tiny.tiny_clip(tmp_path, seed=1))}
    for changed in (other, {**inner, "text": "whole"}, {**inner, "segmenter": "longalign"}):
        with pytest.raises(ValueError, match=r"name denscore.*texts differ by"):
            rewards.build({"name": "reweighted", "direction": str(direction_file), "inner": changed})


def test_load_direction_rejects_missing_or_wrong_file(inner, tmp_path):
    config = {"name": "reweighted", "inner": inner}
    with pytest.raises(ValueError, match=r"no file 'runing'.*'batch', 'running'"):
        rewards.build({**config, "direction": "runing"})
    save_file({"V": torch.ones(16)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors.*longalign-direction-1"):
        load_direction(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"is damaged.*longalign compute-direction"):
        load_direction(tmp_path / "b.safetensors")


@pytest.mark.parametrize("prompts", [[], ["up"], ["up", "up", "up"]])
def test_compute_direction_rejects_fewer_than_two_prompts(known, prompts):
    with pytest.raises(ValueError, match=f"2 different prompts, got {len(prompts)}"):
        compute_direction(known, prompts)


def test_write_direction_rejects_sum(inner, tmp_path):
    with pytest.raises(ValueError, match=r"text embeddings, got 'sum'"):
        write_direction({"name": "sum", "terms": [{"reward": inner}]}, PROMPTS, tmp_path / "V.safetensors")
