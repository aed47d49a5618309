import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longalign.directions import compute, compute_direction, load_direction, measure_direction
from longalign.directions.compute import write_direction
from longalign.image_folder import append_images, image_row
from longalign.registry import rewards
from longalign.testing import tiny

PROMPTS = ["A red fox sleeps. The sky is green.", "A wall.", "The sky is red. A fox sleeps on a wall.", "A green fox."]


@pytest.fixture(scope="module")
def inner(clip_folder):
    return {"name": "denscore", "checkpoint": clip_folder}


@pytest.fixture(scope="module")
def direction_file(inner, tmp_path_factory):
    path = tmp_path_factory.mktemp("direction") / "new" / "V.safetensors"
    write_direction(inner, path, prompts=PROMPTS, batch_size=3)
    return path


def test_compute_direction_values(known):
    direction = compute_direction(known, iter(["up", "down", "up", "down"]), batch_size=3)
    assert torch.allclose(direction.vector, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert direction.count == 4
    assert direction.components["mean"] == pytest.approx(0.6)
    assert direction.components["std"] == pytest.approx(0.0, abs=1e-6)


def test_compute_direction_eta_distribution(known):
    direction = compute_direction(known, ["along", "up", "down"])
    assert direction.components["quantiles"]["0.0"] == pytest.approx(0.6)
    assert direction.components["quantiles"]["0.5"] == pytest.approx(0.6)
    assert direction.components["quantiles"]["1.0"] == pytest.approx(1.0)
    assert direction.components["counts"] == [2, 1]  # the square root of three prompts, rounded up
    report = direction.report()
    assert "common direction of 3 prompts, width 3" in report
    assert "mean 0.7333" in report
    assert "100% 1.0000" in report


def test_compute_direction_large_corpus_samples_eta(known, monkeypatch):
    monkeypatch.setattr(compute, "NUM_SAMPLED", 8)
    direction = compute_direction(known, ["up", "down", "along"] * 10, batch_size=7)
    assert torch.allclose(direction.vector, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert (direction.count, direction.components["count"], sum(direction.components["counts"])) == (30, 8, 8)
    assert "eta of 8 of them" in direction.report()


def test_compute_direction_independent_of_batch_size(inner):
    reward = rewards.build(inner)
    one, all_at_once = (compute_direction(reward, PROMPTS, size).vector for size in (1, 4))
    assert torch.allclose(one, all_at_once, atol=1e-6)
    batch = rewards.build({"name": "reweighted", "inner": inner})
    assert torch.allclose(one, batch.common(reward.text_features(PROMPTS), False), atol=1e-6)


def test_direction_file_is_self_describing(direction_file, inner):
    with safe_open(direction_file, "pt") as file:
        assert file.get_slice("vector").get_shape() == [16]
        metadata = file.metadata()
    assert json.loads(metadata["inner"])["checkpoint"] == inner["checkpoint"]
    assert json.loads(metadata["inner"])["segmenter"] == {"name": "sentence"}
    assert (json.loads(metadata["kind"]), json.loads(metadata["count"])) == ("text", 4)
    assert set(json.loads(metadata["components"])) == {"count", "mean", "std", "quantiles", "edges", "counts"}
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
    direction = write_direction(config, tmp_path / "V.safetensors", prompts=PROMPTS)
    assert torch.allclose(direction.vector, load_direction(direction_file).vector, atol=1e-6)


def test_direction_file_independent_of_image_settings(direction_file, inner):
    changed = {**inner, "crop": 24, "micro_batch": 1}
    assert (
        rewards.build({"name": "reweighted", "direction": str(direction_file), "inner": changed}).common.mode == "fixed"
    )


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
    with pytest.raises(ValueError, match=r"no file 'runing'.*'batch' or 'running'"):
        rewards.build({**config, "direction": "runing"})
    save_file({"V": torch.ones(16)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors.*longalign-direction-2"):
        load_direction(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"is damaged.*longalign compute-direction"):
        load_direction(tmp_path / "b.safetensors")


@pytest.mark.parametrize("prompts", [[], ["up"], ["up", "up", "up"]])
def test_compute_direction_rejects_fewer_than_two_prompts(known, prompts):
    with pytest.raises(ValueError, match=f"2 different prompts, got {len(prompts)}"):
        compute_direction(known, prompts)


def test_write_direction_rejects_sum(inner, tmp_path):
    with pytest.raises(ValueError, match=r"'sum'.*text embeddings"):
        write_direction({"name": "sum", "terms": [{"reward": inner}]}, tmp_path / "V.safetensors", prompts=PROMPTS)


def write_folder(folder, images, prompts, seeds):
    folder.mkdir()
    rows = [image_row(i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    append_images(folder, rows, images, {})
    return folder


@pytest.fixture
def image_folders(tmp_path):
    """Images of four prompts in two orders: red ones, and green ones of another size."""
    red, green = torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 8, 4)
    red[:, 0], green[:, 1] = 1, 1
    prompts = ["a", "b", "c", "d"]
    return (
        write_folder(tmp_path / "over", red, prompts, range(4)),
        write_folder(tmp_path / "reference", green, prompts[::-1], reversed(range(4))),
    )


def test_measure_direction_is_mean_difference_of_pairs(known, image_folders):
    direction = measure_direction(known, *image_folders, batch_size=3)
    assert torch.allclose(direction.vector, torch.tensor([0.5**0.5, -(0.5**0.5), 0.0]))
    assert (direction.kind, direction.count) == ("images", 4)
    assert direction.components["mean"] == pytest.approx(2**0.5)
    assert direction.origin["halves_cosine"] == pytest.approx(1.0)
    assert "measured direction of 4 pairs, width 3" in direction.report()


def test_measured_direction_of_inner_reward_is_used_by_edit(inner, image_folders, tmp_path):
    file = tmp_path / "D.safetensors"
    edit = {"name": "measured", "file": str(file)}
    config = {"name": "edited", "inner": inner, "edit": "none"}
    direction = write_direction(config, file, images=image_folders)
    loaded = load_direction(file)
    assert (loaded.kind, loaded.origin["over"]) == ("images", str(image_folders[0]))
    reward = rewards.build({**config, "edit": edit})
    text = reward.inner.text_features(PROMPTS)
    found = reward.edit(text, PROMPTS, reward.inner, None)
    assert torch.allclose(found.text @ direction.vector, torch.zeros(4), atol=1e-6)
    assert torch.allclose(found.values["measured_text"], text @ direction.vector, atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "seeds", "common"),
    [(["a", "b"], [0, 1], 2), (["a", "b", "c", "e"], range(4), 3), (["a", "b", "c", "d"], [0, 1, 2, 2], 3)],
)
def test_measure_direction_rejects_unpaired_images(known, image_folders, tmp_path, prompts, seeds, common):
    other = write_folder(tmp_path / "other", torch.rand(len(prompts), 3, 4, 4), prompts, seeds)
    with pytest.raises(ValueError, match=rf"same prompts and seeds .*got {common} in common"):
        measure_direction(known, image_folders[0], other)


def test_measure_direction_rejects_equal_images_and_other_folders(known, image_folders, tmp_path):
    with pytest.raises(ValueError, match="same mean embedding"):
        measure_direction(known, image_folders[0], image_folders[0])
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        measure_direction(known, image_folders[0], tmp_path)
