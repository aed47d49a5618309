"""Preference data of synthetic scenes, folders and tables."""

import json
import logging
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from longalign.data.pairs.base import preference_of
from longalign.loop.batches import Batches, load_batches
from longalign.mini import oracle
from longalign.mini.captions import Caption, Fact, Sentence
from longalign.mini.preferences import preference, taste, truth, vary
from longalign.mini.scenes import Scene, sample_scene
from longalign.registry import ConfigError, data

COLOURS = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}


def encode_image(colour, kind="PNG"):
    buffer = BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.png").write_bytes(encode_image(colour))
    return tmp_path


def write_metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def row(first="r", second="g", **keys):
    return {"image_0": f"{first}.png", "image_1": f"{second}.png", "text": "A text.", **keys}


def build(folder, **keys):
    return data.build({"name": "pairs", "folder": str(folder), "resolution": 4, **keys})


# Synthetic scenes


def test_scene_pairs_are_deterministic_with_their_preference():
    pairs = data.build({"name": "scene-pairs", "size": 6, "seed": 2, "words": [20, 40], "captions": True})
    again = data.build({"name": "scene-pairs", "size": 6, "seed": 2, "words": [20, 40], "captions": True})
    item, later = pairs[3], again[3]
    assert item["prompt"] == later["prompt"] == pairs.prompt(3) and item["captions"] == later["captions"]
    assert torch.equal(item["image"], later["image"]) and item["image"].shape == (2, 3, 64, 64)
    shown, caption = pairs.pair(3)
    assert item["preference"].item() == pytest.approx(preference(*shown, caption, 10.0, 4.0))
    recovered = oracle.read_scenes(item["image"].numpy())
    assert [truth(scene, caption) for scene in recovered] == [truth(scene, caption) for scene in shown]
    assert len(pairs) == 6 and "captions" not in data.build({"name": "scene-pairs", "size": 6})[3]
    with pytest.raises(IndexError):
        pairs[6]


def test_scene_pairs_captions_describe_each_image():
    pairs = data.build({"name": "scene-pairs", "size": 30, "words": [40, 60], "captions": True})
    scenes = [pairs.pair(i)[0] for i in range(30)]
    assert sum(first.things != second.things for first, second in scenes) > 20
    captions = [pairs[i]["captions"] for i in range(30)]
    assert sum(a != b for a, b in captions) == 30


def test_preference_matches_hand_computed_values():
    scene = Scene((), "teal", tint=1.0, vignette=1.0)
    other = Scene((), "navy", tint=-1.0, vignette=0.5)
    caption = Caption((Sentence("The ground is teal.", (Fact("ground", "teal"),)),))
    assert (truth(scene, caption), truth(other, caption)) == (1.0, 0.0)
    assert (taste(scene), taste(other)) == (1.0, -0.5)
    assert preference(scene, other, caption, 2.0, 0.0) == pytest.approx(1 / (1 + np.exp(-2)))
    assert preference(scene, other, caption, 2.0, 3.0) == pytest.approx(1 / (1 + np.exp(-6.5)))
    assert preference(other, scene, caption, 2.0, 3.0) == pytest.approx(1 / (1 + np.exp(6.5)))
    assert preference(scene, scene, caption, 2.0, 3.0) == 0.5


def test_vary_leaves_about_a_third_of_scenes_unchanged():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, (6, 6))
    varied = [vary(scene, rng) for _ in range(200)]
    unchanged = np.mean([v.things == scene.things and v.ground == scene.ground for v in varied])
    assert 0.25 < unchanged < 0.45
    assert min(len(v.things) for v in varied) < 6 and len({v.tint for v in varied}) == 200


# A folder


def test_folder_pairs_have_images_labels_and_captions_in_order(folder):
    captions = {"caption_0": "All red.", "caption_1": "All green."}
    dataset = build(
        write_metadata(folder, row(label_0=1, label_1=0, **captions), row("b", "r", preference=0.25, **captions))
    )
    item = dataset[0]
    assert item["image"].shape == (2, 3, 4, 4)
    assert item["image"][:, :, 0, 0].tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert (item["prompt"], item["captions"], item["preference"].item()) == ("A text.", ("All red.", "All green."), 1.0)
    assert dataset[-1]["preference"].item() == 0.25 and dataset.prompt(1) == "A text."
    batch = next(load_batches(dataset, Batches(2, 2, seed=0), True, 0))
    assert batch["image"].shape == (2, 2, 3, 4, 4) and batch["preference"].shape == (2,)
    assert batch["captions"] == [("All red.", "All green.")] * 2


def test_folder_pairs_skip_and_count_missing_labels_and_prompts(folder, caplog):
    rows = [row(label_0=None, label_1=None), row(text=" ", label_0=1, label_1=0), row(label_0=0.5, label_1=0.5), row()]
    dataset = build(write_metadata(folder, *rows))
    assert len(dataset) == 1 and dataset[0]["preference"].item() == 0.5
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert re.search("of 4 pairs in .*: 2 with .*label, 1 with .*prompt", record.getMessage())
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*1 with .*label"):
        build(write_metadata(folder, row()))


def test_folder_pairs_replace_pairs_with_unreadable_images(folder, damaged, caplog):
    (folder / "b.png").write_bytes(b"no image")
    dataset = build(write_metadata(folder, row("r", "b", preference=1), row("g", "r", preference=0)))
    assert dataset[0]["preference"].item() == 0.0
    assert "r.png and b.png" in caplog.text
    with pytest.raises(ValueError, match=r"1 images.*max_unreadable=0.*b\.png"):
        _ = build(folder, max_unreadable=0)[0]
    (folder / "b.png").write_bytes(damaged)
    assert build(folder)[0]["preference"].item() == 0.0


def test_folder_pairs_reject_invalid_lines(folder):
    with pytest.raises(ValueError, match=r"line 1.*'image_0'.*'image_1'.*image_0, text"):
        build(write_metadata(folder, {"image_0": "r.png", "text": "a"}))
    with pytest.raises(ValueError, match=r"line 1.*got \[2\]"):
        build(write_metadata(folder, row(preference=2)))
    mixed = [row(preference=1), row(preference=1, caption_0="a", caption_1="b")]
    with pytest.raises(ValueError, match=r"captions.*1 of 2 pairs"):
        build(write_metadata(folder, *mixed))


@pytest.mark.parametrize(
    ("labels", "fraction"), [([1, 0], 1.0), ([0.5, 0.5], 0.5), ([3, 1], 0.75), ([0.3], 0.3), ([True, False], 1.0)]
)
def test_preference_of_valid_labels(labels, fraction):
    assert preference_of(labels, "here") == fraction


@pytest.mark.parametrize("labels", [[0, 0], [-1, 2], [1, 0, 0], [], [1.5], ["1", "0"], [float("nan"), 1]])
def test_preference_of_rejects_invalid_labels(labels):
    with pytest.raises(ValueError, match=f"^here: .*{re.escape(repr(labels))}"):
        preference_of(labels, "here")


# A table


def test_hub_pairs_read_pick_a_pic_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    red, green = encode_image(COLOURS["r"], "JPEG"), encode_image(COLOURS["g"], "JPEG")
    columns = {
        "caption": ["a fox", "a wall", "a sky", "a bed"],
        "jpg_0": [red, green, red, b"no image"],
        "jpg_1": [green, red, green, red],
        "label_0": [1.0, 0.5, None, 0.0],
        "label_1": [0.0, 0.5, None, 1.0],
        "unused": [1, 2, 3, 4],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "part.parquet")
    keys = {"dataset": "parquet", "files": str(tmp_path / "part.parquet"), "cache": str(tmp_path / "cache")}
    dataset = data.build({"name": "hf-pairs", **keys, "resolution": 4})
    assert [dataset.prompt(i) for i in range(len(dataset))] == ["a fox", "a wall", "a bed"]
    assert [dataset[i]["preference"].item() for i in (0, 1)] == [1.0, 0.5]
    assert dataset[0]["image"][:, :, 0, 0].round().tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert dataset[2]["prompt"] == "a fox" and "row 3 of parquet" in dataset.unreadable
    with pytest.raises(ValueError, match=r"'prompt'.*caption, jpg_0"):
        data.build({"name": "hf-pairs", **keys, "caption": "prompt"})


def test_hub_pairs_read_hpd_columns(folder):
    pytest.importorskip("datasets")
    row = {
        "prompt": "a fox",
        "image_path": ["r.png", "g.png"],
        "human_preference": [0, 1],
        "texts": ["Red.", "Green."],
    }
    (folder / "train.json").write_text(json.dumps([row]))
    dataset = data.build(
        {
            "name": "hf-pairs", "dataset": "json", "files": str(folder / "train.json"), "caption": "prompt",
            "images": "image_path", "labels": "human_preference", "captions": "texts", "image_folder": str(folder),
            "cache": str(folder / "cache"), "resolution": 4,
        }
    )  # fmt: skip
    item = dataset[0]
    assert item["image"][:, :, 0, 0].tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert item["preference"].item() == 0.0 and item["captions"] == ("Red.", "Green.")


def test_hub_pairs_config_rejects_wrong_column_counts():
    with pytest.raises(ConfigError, match="images"):
        data.validate({"name": "hf-pairs", "dataset": "x", "images": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="labels"):
        data.validate({"name": "hf-pairs", "dataset": "x", "labels": []})
