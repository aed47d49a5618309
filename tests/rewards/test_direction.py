import json

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longalign.registry import rewards
from longalign.rewards import direction as module
from longalign.rewards.direction import compute_direction, load_direction, write_direction

PROMPTS = ["A red fox sleeps. The sky is green.", "A wall.", "The sky is red. A fox sleeps on a wall.", "A green fox."]


@pytest.fixture(scope="module")
def inner(clip_folder):
    return {"name": "denscore", "checkpoint": clip_folder}


@pytest.fixture(scope="module")
def file(inner, tmp_path_factory):
    path = tmp_path_factory.mktemp("direction") / "new" / "V.safetensors"
    write_direction(inner, PROMPTS, path, batch_size=3)
    return path


def test_v_and_eta_by_hand(known):
    found = compute_direction(known, iter(["up", "down", "up", "down"]), batch_size=3)
    assert torch.allclose(found.vector, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert found.num_prompts == 4
    assert found.eta["mean"] == pytest.approx(0.6)
    assert found.eta["std"] == pytest.approx(0.0, abs=1e-6)


def test_etas_distribution(known):
    found = compute_direction(known, ["along", "up", "down"])
    assert found.eta["quantiles"]["0.0"] == pytest.approx(0.6)
    assert found.eta["quantiles"]["0.5"] == pytest.approx(0.6)
    assert found.eta["quantiles"]["1.0"] == pytest.approx(1.0)
    assert (found.eta["counts"][0], found.eta["counts"][-1], sum(found.eta["counts"])) == (2, 1, 3)
    report = found.report()
    assert len(found.eta["counts"]) == 2  # bins, for three prompts
    assert "common direction of 3 prompts, width 3" in report
    assert "mean 0.7333" in report
    assert "100% 1.0000" in report


def test_a_large_corpus_gives_v_of_all_and_eta_of_a_sample(known, monkeypatch):
    monkeypatch.setattr(module, "NUM_SAMPLED", 8)
    found = compute_direction(known, ["up", "down", "along"] * 10, batch_size=7)
    assert torch.allclose(found.vector, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert (found.num_prompts, found.eta["num_prompts"], sum(found.eta["counts"])) == (30, 8, 8)
    assert "eta of 8 of them" in found.report()


def test_the_batch_size_changes_nothing(inner):
    reward = rewards.build(inner)
    one, all_at_once = (compute_direction(reward, PROMPTS, size).vector for size in (1, 4))
    assert torch.allclose(one, all_at_once, atol=1e-6)
    batch = rewards.build({"name": "reweighted", "inner": inner})
    assert torch.allclose(one, batch.direction(reward.text_features(PROMPTS)), atol=1e-6)


def test_the_file_explains_itself(file, inner):
    with safe_open(file, "pt") as content:
        assert content.get_slice("V").get_shape() == [16]
        metadata = content.metadata()
    assert json.loads(metadata["inner"])["checkpoint"] == inner["checkpoint"]
    assert json.loads(metadata["inner"])["segmenter"] == {"name": "sentence"}
    assert json.loads(metadata["num_prompts"]) == 4
    assert set(json.loads(metadata["eta"])) == {"num_prompts", "mean", "std", "quantiles", "edges", "counts"}
    loaded = load_direction(file)
    assert torch.allclose(loaded.vector.norm(), torch.tensor(1.0))
    assert "name denscore" in loaded.report()


def test_a_reward_takes_it_and_scores_a_batch_of_one(file, inner):
    reward = rewards.build({"name": "reweighted", "direction": str(file), "omega": 0.0, "inner": inner})
    image = torch.rand(1, 3, 32, 32)
    alone = reward.score(image, PROMPTS[:1])
    assert torch.allclose(alone, reward.score(image.repeat(2, 1, 1, 1), PROMPTS[:2])[:1], atol=1e-6)
    vector = load_direction(file).vector
    text = reward.inner.text_features(PROMPTS[:1])
    across = text - (text @ vector)[:, None] * vector
    assert torch.allclose(alone, (reward.inner.image_features(image) * across).sum(-1), atol=1e-6)


def test_it_may_be_made_from_the_reweighted_config(file, inner, tmp_path):
    config = {"name": "reweighted", "direction": "running", "inner": inner}
    found = write_direction(config, PROMPTS, tmp_path / "V.safetensors")
    assert torch.allclose(found.vector, load_direction(file).vector, atol=1e-6)


def test_image_settings_do_not_matter_to_it(file, inner):
    changed = {**inner, "crop": 24, "micro_batch": 1}
    assert rewards.build({"name": "reweighted", "direction": str(file), "inner": changed}).mode == "fixed"


def test_another_width_is_refused(file, tmp_path):
    other = {"name": "denscore", "checkpoint": str(tiny.tiny_clip(tmp_path, width=8))}
    with pytest.raises(ValueError, match=r"width 16, made with name denscore.*has width 8"):
        rewards.build({"name": "reweighted", "direction": str(file), "inner": other})


def test_other_weights_or_another_reading_of_the_text_are_refused(file, inner, tmp_path):
    other = {"name": "denscore", "checkpoint": str(tiny.tiny_clip(tmp_path, seed=1))}
    for changed in (other, {**inner, "text": "whole"}, {**inner, "segmenter": "longalign"}):
        with pytest.raises(ValueError, match="made with another reward, name denscore"):
            rewards.build({"name": "reweighted", "direction": str(file), "inner": changed})


def test_files_that_are_none_are_refused(inner, tmp_path):
    config = {"name": "reweighted", "inner": inner}
    with pytest.raises(ValueError, match=r"'batch', 'running' or a file .* no file 'runing'"):
        rewards.build({**config, "direction": "runing"})
    save_file({"V": torch.ones(16)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a direction file"):
        load_direction(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"is damaged.*longalign direction"):
        load_direction(tmp_path / "b.safetensors")


@pytest.mark.parametrize("prompts", [[], ["up"], ["up", "up", "up"]])
def test_one_prompt_makes_no_direction(known, prompts):
    with pytest.raises(ValueError, match=f"two different prompts, got {len(prompts)}"):
        compute_direction(known, prompts)


def test_a_sum_has_no_direction(inner, tmp_path):
    with pytest.raises(ValueError, match="'sum' has no text embeddings"):
        write_direction({"name": "sum", "terms": [{"reward": inner}]}, PROMPTS, tmp_path / "V.safetensors")
