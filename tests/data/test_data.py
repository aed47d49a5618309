"""Data of synthetic scenes, folders and prompt files."""

import json
import logging
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import longalign.data
from longalign.config.changes import override
from longalign.data.config import DataConfig
from longalign.data.images.base import ImageLoader
from longalign.data.images.folder import Folder
from longalign.data.prompts.prompts import Prompts
from longalign.data.scenes.config import ScenesConfig
from longalign.data.scenes.scenes import Scenes
from longalign.files.lines import inside, read_prompts
from longalign.mini import oracle
from longalign.registry import ConfigError, data
from longalign.runtime import Runtime


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def save_image(path, colour, size=(8, 8)):
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("r", (255, 0, 0)), ("g", (0, 255, 0)), ("b", (0, 0, 255))):
        save_image(tmp_path / f"{name}.png", colour)
    write_metadata(tmp_path, [{"file_name": f"{n}.png", "text": f"All {n}."} for n in "rgb"])
    return tmp_path


def raise_error(error):
    raise error


def build(folder, **keys):
    return data.build({"name": "folder", "folder": str(folder), "resolution": 4, **keys})


def make_scenes(size, **keys):
    return Scenes.from_config(ScenesConfig(size=size, **keys), Runtime())


def test_scenes_item_is_deterministic():
    scenes = data.build({"name": "scenes", "size": 5, "seed": 3, "words": [30, 60]})
    again = make_scenes(5, seed=3, words=(30, 60))
    later = again[4]
    assert scenes[4]["prompt"] == later["prompt"] == scenes.prompt(4) == scenes[-1]["prompt"]
    assert torch.equal(scenes[4]["image"], later["image"])
    assert scenes[0]["prompt"] != scenes[1]["prompt"]
    assert make_scenes(5, seed=4, words=(30, 60))[4]["prompt"] != later["prompt"]
    assert (later["image"].shape, later["image"].dtype) == ((3, 64, 64), torch.float32)
    assert 0 <= later["image"].min() <= later["image"].max() <= 1


def test_scenes_raise_index_error_past_the_end():
    assert len([item["prompt"] for item in make_scenes(3, words=(8, 8))]) == 3
    with pytest.raises(IndexError):
        make_scenes(3)[3]


def test_scenes_captions_are_true_of_their_images():
    scenes = make_scenes(8, seed=1, words=(60, 120))
    images = np.stack([scenes[i]["image"].numpy() for i in range(8)])
    captions = [scenes.scene(i)[1] for i in range(8)]
    assert [c.text for c in captions] == [scenes.prompt(i) for i in range(8)]
    assert oracle.fact_accuracy(images, captions).min() == 1.0


def test_scenes_follow_objects_words_and_style():
    scenes = make_scenes(20, objects=(2, 3), words=(50, 60), style="referring")
    pairs = [scenes.scene(i) for i in range(20)]
    assert {len(scene.things) for scene, _ in pairs} == {2, 3}
    assert 40 < np.mean([caption.num_words for _, caption in pairs]) < 75
    referring = sum(" it " in f" {c.text.lower()} " for _, c in pairs)
    assert referring > 10
    plain = make_scenes(20, objects=(2, 3), words=(50, 60))
    assert sum(" it is " in f" {plain.prompt(i).lower()} " for i in range(20)) == 0
    mixed = make_scenes(40, objects=(2, 3), words=(50, 60), style="mixed")
    count = sum(" it " in f" {mixed.prompt(i).lower()} " for i in range(40))
    assert 5 < count < 35


@pytest.mark.parametrize(
    ("keys", "path"),
    [({"objects": [3, 2]}, "objects"), ({"objects": [0, 10]}, "objects.1"), ({"words": [9, 8]}, "words")],
)
def test_scenes_config_rejects_invalid_ranges(keys, path):
    with pytest.raises(ConfigError) as error:
        data.validate({"name": "scenes", **keys})
    assert [key for key, _ in error.value.errors] == [path]


def test_scenes_are_collated_by_data_loader():
    batch = next(iter(DataLoader(make_scenes(4, words=(8, 12)), batch_size=4)))
    assert batch["image"].shape == (4, 3, 64, 64)
    assert len(batch["prompt"]) == 4


def test_folder_items_have_image_and_caption(folder):
    dataset = build(folder)
    assert len(dataset) == 3
    assert [dataset[i]["prompt"] for i in range(3)] == ["All r.", "All g.", "All b."]
    assert dataset[1]["image"].shape == (3, 4, 4)
    assert dataset[1]["image"][:, 0, 0].tolist() == [0.0, 1.0, 0.0]
    assert dataset.prompt(-1) == "All b."


def test_load_square_centre_crops_and_applies_exif_rotation(tmp_path):
    wide = Image.new("RGB", (12, 4), (255, 0, 0))
    wide.paste((0, 255, 0), (4, 0, 8, 4))
    wide.save(tmp_path / "wide.png")
    assert ImageLoader(4).load("image", tmp_path / "wide.png")[1].min() == 1.0
    half = Image.new("RGB", (4, 4), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 4, 2))
    exif = half.getexif()
    exif[0x0112] = 3  # rotated by 180 degrees
    half.save(tmp_path / "turned.png", exif=exif)
    assert ImageLoader(4).load("image", tmp_path / "turned.png")[0, :, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    Image.new("L", (4, 4), 51).save(tmp_path / "grey.png")
    assert ImageLoader(4).load("image", tmp_path / "grey.png").unique().tolist() == pytest.approx([0.2])


def test_folder_replaces_and_logs_unreadable_images(folder, caplog):
    (folder / "r.png").write_bytes(b"no image")
    (folder / "g.png").write_bytes((folder / "b.png").read_bytes()[:40])
    dataset = build(folder, max_unreadable=2)
    for _ in range(2):
        assert dataset[0]["prompt"] == "All b."
    assert [path.name for path in dataset.unreadable] == ["r.png", "g.png"]
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 2
    assert "r.png" in warned[0] and "UnidentifiedImageError" in warned[0]


def test_folder_replaces_images_with_unexpected_pillow_errors(folder, damaged, monkeypatch):
    (folder / "r.png").write_bytes(damaged)
    dataset = build(folder)
    assert dataset[0]["prompt"] == "All g."
    assert list(dataset.unreadable) == [folder / "r.png"]
    for error in (TypeError, KeyError, RuntimeError, struct.error, EOFError):
        monkeypatch.setattr(ImageOps, "exif_transpose", lambda image, error=error: raise_error(error("odd")))
        with pytest.raises(ValueError, match=f"{error.__name__}: .*odd"):
            ImageLoader(4).load("image", folder / "g.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: raise_error(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ImageLoader(4).load("image", folder / "g.png")


def test_folder_raises_above_max_unreadable(folder):
    for name in ("r.png", "g.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 images.*max_unreadable=1: .*r\.png .*g\.png"):
        _ = build(folder, max_unreadable=1)[0]
    (folder / "b.png").unlink()
    dataset = build(folder)
    with pytest.raises(ValueError, match=r"none of the 3 images.*b\.png \(FileNotFoundError"):
        _ = dataset[0]


def test_folder_skips_or_keeps_empty_captions(folder, caplog):
    write_metadata(
        folder,
        [
            {"file_name": "r.png", "text": ""},
            {"file_name": "g.png", "text": None},
            {"file_name": "b.png", "prompt": "B."},
        ],
    )
    with caplog.at_level(logging.WARNING):
        assert [build(folder).prompt(i) for i in range(1)] == ["B."]
    assert "2 of 3 captions" in caplog.text
    complete = build(folder, empty="keep")
    assert [complete.prompt(i) for i in range(3)] == ["", "", "B."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "r.png"}', "line 1.*'text'.*'prompt'.*file_name"),
        ('\n{"text": "a"}', "line 2.*'file_name'.*text"),
        ('{"file_name": "r.png", "text": 3}', "line 1.*'text'.*got 3"),
        ("{", "line 1.*JSON"),
        ("[1]", r"line 1.*got \[1\]"),
        ("", r"no image in .*test_folder_rejects"),
    ],
)
def test_folder_rejects_invalid_metadata_lines(tmp_path, text, message):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_folder_without_metadata_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        build(tmp_path)
    with pytest.raises(ValueError, match="got 1 files and 0 prompts"):
        Folder([tmp_path], [], resolution=4, max_unreadable=0)


def test_read_prompts_from_txt_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\ntwo\u2028more\n\nthree\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two\u2028more", "", "three"]
    rows = [{"prompt": "A.\n\nB."}, {"text": "\u2028C"}, {"text": "", "prompt": "x"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", "utf-8")
    assert read_prompts(tmp_path / "b.jsonl") == ["A.\n\nB.", "C", ""]
    assert read_prompts(str(tmp_path / "a.txt"))[0] == "one"


def test_prompts_data_skips_or_keeps_empty_prompts(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    dataset = data.build({"name": "prompts", "file": str(tmp_path / "a.txt")})
    assert [dataset[i] for i in range(len(dataset))] == [{"prompt": "one"}, {"prompt": "two"}]
    assert "1 of 3 prompts" in caplog.text
    assert (dataset.has_images, Scenes.has_images) == (False, True)
    assert len(data.build({"name": "prompts", "file": str(tmp_path / "a.txt"), "empty": "keep"})) == 3


def test_read_prompts_rejects_invalid_files(tmp_path):
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"\.txt or \.jsonl.*a\.csv"):
        read_prompts(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"latin\.txt.*UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.txt"):
        read_prompts(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"a\.txt.*no prompts"):
        data.build({"name": "prompts", "file": str(tmp_path / "a.txt")})
    with pytest.raises(ValueError, match="at least one prompt"):
        Prompts([])


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/{outside}/secret.png", ".."])
def test_inside_rejects_paths_outside_the_folder(tmp_path, name):
    save_image(tmp_path / "secret.png", "red")
    folder = tmp_path / "in"
    folder.mkdir()
    name = name.replace("/{outside}", str(tmp_path))
    with pytest.raises(ValueError, match=f"{re.escape(name)}'.*{re.escape(str(folder))}"):
        inside(folder, name)
    write_metadata(folder, [{"file_name": name, "text": "A."}])
    with pytest.raises(ValueError, match=f"line 1: .*{re.escape(name)}"):
        build(folder)
    write_metadata(folder, [{"image_0": "a.png", "image_1": name, "text": "A.", "label_0": 1, "label_1": 0}])
    with pytest.raises(ValueError, match=f"line 1: .*{re.escape(name)}"):
        data.build({"name": "pairs", "folder": str(folder)})


def test_inside_accepts_relative_absolute_and_linked_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inside("a", "b/../c..png") == Path("a/c..png")
    assert inside("a", str(tmp_path / "a" / "c.png")) == Path("a/c.png")
    assert inside(tmp_path, "x.png") == tmp_path / "x.png"
    assert inside("/", "/etc/x") == Path("/etc/x")
    with pytest.raises(ValueError, match=r"ab/c\.png.* a;"):
        inside("a", str(tmp_path / "ab" / "c.png"))
    (tmp_path / "farm").mkdir()
    save_image(tmp_path / "far.png", "red")
    (tmp_path / "farm" / "near.png").symlink_to(tmp_path / "far.png")
    write_metadata(tmp_path / "farm", [{"file_name": "near.png", "text": "A."}])
    assert build(tmp_path / "farm")[0]["image"][0].min() == 1


def test_folder_reads_metadata_csv(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\nr.png,"Red, all."\ng.png,\nb.png,Blue.\n', "utf-8-sig")
    dataset = build(folder)
    assert [dataset.prompt(i) for i in range(2)] == ["Red, all.", "Blue."] and len(dataset) == 2
    (folder / "metadata.csv").write_text("file_name,text\nr.png,Red, all.\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2.*cells"):
        build(folder)
    (folder / "metadata.csv").write_text("file,text\nr.png,Red.\n")
    with pytest.raises(ValueError, match=r"line 2.*'file_name'.*file, text"):
        build(folder)
    (folder / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match=r"metadata\.jsonl and .*metadata\.csv"):
        build(folder)


def test_folder_reads_txt_next_to_images(folder, caplog):
    (folder / "metadata.jsonl").unlink()
    (folder / "more").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("more/y.jpg", ".hidden/z.png"):
        save_image(folder / name, "yellow")
        (folder / name).with_suffix(".txt").write_text("Yellow.")
    (folder / "r.txt").write_text(" Red.\nAll of it.\n")
    (folder / "g.txt").write_text("")
    dataset = build(folder)
    assert [dataset.prompt(i) for i in range(len(dataset))] == ["Yellow.", "Red.\nAll of it."]
    assert "1 of 4 images" in caplog.text and "1 of 3 captions" in caplog.text
    assert len(build(folder, empty="keep")) == 3


def test_folder_rejects_deeply_nested_json(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"line 1.*JSON"):
        build(tmp_path)


def test_missing_metadata_error_shows_an_example(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'metadata\.jsonl.*"file_name": .*metadata\.csv.*\.txt'):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'metadata\.jsonl.*"image_0": '):
        data.build({"name": "pairs", "folder": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"no folder .*none"):
        build(tmp_path / "none")


def test_folder_warns_of_upscaled_images(folder, caplog):
    dataset = build(folder, resolution=9)
    for i in range(12):
        _ = dataset[i % 3]
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 2 and warned[0].startswith("1 of the images") and warned[1].startswith("10 of the images")
    assert "resolution=9" in warned[0] and "8 by 8" in warned[0]
    caplog.clear()
    _ = build(folder, resolution=8)[0]
    assert not caplog.records


def test_null_resolution_is_that_of_the_backbone(folder, tmp_path_factory):
    from longalign.compose import build_from_config
    from longalign.testing.tiny import tiny_sd

    base = str(tiny_sd(tmp_path_factory.mktemp("sd")))
    run = {"backbone": {"name": "sd", "checkpoint": base}, "data": {"name": "folder", "folder": str(folder)}}
    run |= {"encoder": {"name": "clip-segment", "checkpoint": base}, "trainer": "align", "output": "x"}
    assert build_from_config(run).data[0]["image"].shape == (3, 64, 64)
    assert build_from_config(override(run, {"data.resolution": 16})).data[0]["image"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"resolution null.*pixels"):
        build(folder, resolution=None)


def test_folder_rejects_lone_surrogates(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "r.png", "text": "A."}\n{"file_name": "g.png", "text": "\\ud800"}'
    )
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: 'text'"):
        build(folder)


def test_configs_declare_what_a_run_asks():
    def declared(name, **keys):
        config = data.validate({"name": name, **keys})
        assert isinstance(config, DataConfig)
        return config.has_images, config.has_pairs, config.is_stream, config.image_sizes.get("resolution")

    assert declared("scenes") == (True, False, False, None)
    assert declared("scene-pairs") == (True, True, False, None)
    assert declared("folder", folder="x", resolution=16) == (True, False, False, ((16, 16),))
    assert declared("webdataset", shards="x") == (True, False, True, ())
    assert declared("hf", dataset="x", streaming=True) == (True, False, True, ())
    assert declared("hf", dataset="x", image=None) == (False, False, False, ())
    assert declared("pairs", folder="x") == declared("hf-pairs", dataset="x") == (True, True, False, [(224, 224)])
    assert declared("prompts", file="x") == (False, False, False, None)


def test_data_exports_its_classes_lazily():
    for name in dir(longalign.data):
        if name[0].isupper() and name != "TYPE_CHECKING" and name != "Any":
            assert getattr(longalign.data, name).__name__ == name
    with pytest.raises(AttributeError, match=r"'longalign\.data' .*'Nothing'"):
        _ = longalign.data.Nothing
