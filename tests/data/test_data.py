"""Scenes, folders and prompt files as data."""

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

from longalign.config import override
from longalign.data.folder import Folder, load_square
from longalign.data.lines import inside, read_prompts
from longalign.data.prompts import Prompts
from longalign.data.scenes import Scenes
from longalign.mini import oracle
from longalign.registry import ConfigError, data


def write(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def picture(path, colour, size=(8, 8)):
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("r", (255, 0, 0)), ("g", (0, 255, 0)), ("b", (0, 0, 255))):
        picture(tmp_path / f"{name}.png", colour)
    write(tmp_path, [{"file_name": f"{n}.png", "text": f"All {n}."} for n in "rgb"])
    return tmp_path


def raise_(error):
    raise error


def build(folder, **keys):
    return data.build({"name": "folder", "folder": str(folder), "resolution": 4, **keys})


def test_a_scene_is_the_same_whenever_it_is_asked_for():
    scenes = data.build({"name": "scenes", "size": 5, "seed": 3, "words": [30, 60]})
    again = Scenes(5, 3, words=(30, 60))
    later = again[4]
    assert scenes[4]["prompt"] == later["prompt"] == scenes.prompt(4) == scenes[-1]["prompt"]
    assert torch.equal(scenes[4]["image"], later["image"])
    assert scenes[0]["prompt"] != scenes[1]["prompt"]
    assert Scenes(5, 4, words=(30, 60))[4]["prompt"] != later["prompt"]
    assert (later["image"].shape, later["image"].dtype) == ((3, 64, 64), torch.float32)
    assert 0 <= later["image"].min() <= later["image"].max() <= 1


def test_scenes_end():
    assert len([item["prompt"] for item in Scenes(3, words=(8, 8))]) == 3
    with pytest.raises(IndexError):
        Scenes(3)[3]


def test_captions_tell_what_their_images_show():
    scenes = Scenes(8, seed=1, words=(60, 120))
    images = np.stack([scenes[i]["image"].numpy() for i in range(8)])
    captions = [scenes.scene(i)[1] for i in range(8)]
    assert [c.text for c in captions] == [scenes.prompt(i) for i in range(8)]
    assert oracle.fact_accuracy(images, captions).min() == 1.0


def test_objects_words_and_style_are_obeyed():
    scenes = Scenes(20, objects=(2, 3), words=(50, 60), style="referring")
    drawn = [scenes.scene(i) for i in range(20)]
    assert {len(scene.things) for scene, _ in drawn} == {2, 3}
    assert 40 < np.mean([caption.num_words for _, caption in drawn]) < 75
    referring = sum(" it " in f" {c.text.lower()} " for _, c in drawn)
    assert referring > 10
    plain = Scenes(20, objects=(2, 3), words=(50, 60))
    assert sum(" it is " in f" {plain.prompt(i).lower()} " for i in range(20)) == 0
    mixed = Scenes(40, objects=(2, 3), words=(50, 60), style="mixed")
    share = sum(" it " in f" {mixed.prompt(i).lower()} " for i in range(40))
    assert 5 < share < 35


@pytest.mark.parametrize(
    ("keys", "path"),
    [({"objects": [3, 2]}, "objects"), ({"objects": [0, 10]}, "objects.1"), ({"words": [9, 8]}, "words")],
)
def test_ranges_that_are_none(keys, path):
    with pytest.raises(ConfigError) as error:
        data.validate({"name": "scenes", **keys})
    assert [where for where, _ in error.value.errors] == [path]


def test_a_loader_collates_prompts_and_images():
    batch = next(iter(DataLoader(Scenes(4, words=(8, 12)), batch_size=4)))
    assert batch["image"].shape == (4, 3, 64, 64)
    assert len(batch["prompt"]) == 4


def test_a_folder_gives_images_with_their_captions(folder):
    found = build(folder)
    assert len(found) == 3
    assert [found[i]["prompt"] for i in range(3)] == ["All r.", "All g.", "All b."]
    assert found[1]["image"].shape == (3, 4, 4)
    assert found[1]["image"][:, 0, 0].tolist() == [0.0, 1.0, 0.0]
    assert found.prompt(-1) == "All b."


def test_the_middle_square_is_taken_upright(tmp_path):
    wide = Image.new("RGB", (12, 4), (255, 0, 0))
    wide.paste((0, 255, 0), (4, 0, 8, 4))
    wide.save(tmp_path / "wide.png")
    assert load_square(tmp_path / "wide.png", 4)[1].min() == 1.0
    half = Image.new("RGB", (4, 4), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 4, 2))
    exif = half.getexif()
    exif[0x0112] = 3  # turned by half
    half.save(tmp_path / "turned.png", exif=exif)
    assert load_square(tmp_path / "turned.png", 4)[0, :, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    Image.new("L", (4, 4), 51).save(tmp_path / "grey.png")
    assert load_square(tmp_path / "grey.png", 4).unique().tolist() == pytest.approx([0.2])


def test_unreadable_images_are_named_counted_and_replaced(folder, caplog):
    (folder / "r.png").write_bytes(b"no image")
    (folder / "g.png").write_bytes((folder / "b.png").read_bytes()[:40])
    found = build(folder, max_unreadable=2)
    for _ in range(2):
        assert found[0]["prompt"] == "All b."
    assert [path.name for path in found.unreadable] == ["r.png", "g.png"]
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 2
    assert "r.png cannot be read and is replaced by the next image" in warned[0]


def test_images_damaged_in_ways_of_their_own_are_replaced_too(folder, damaged, monkeypatch):
    (folder / "r.png").write_bytes(damaged)
    found = build(folder)
    assert found[0]["prompt"] == "All g."
    assert list(found.unreadable) == [folder / "r.png"]
    for error in (TypeError, KeyError, RuntimeError, struct.error, EOFError):
        monkeypatch.setattr(ImageOps, "exif_transpose", lambda image, error=error: raise_(error("odd")))
        with pytest.raises(ValueError, match=f"{error.__name__}: .*odd"):
            load_square(folder / "g.png", 4)
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: raise_(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_square(folder / "g.png", 4)


def test_too_many_unreadable_images_stop_the_run(folder):
    for name in ("r.png", "g.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 images cannot be read, more than max_unreadable=1: .*r\.png .*g\.png"):
        _ = build(folder, max_unreadable=1)[0]
    (folder / "b.png").unlink()
    found = build(folder)
    with pytest.raises(ValueError, match=r"none of the 3 images can be read: .*b\.png \(FileNotFoundError"):
        _ = found[0]


def test_empty_captions_are_skipped_or_kept_and_counted(folder, caplog):
    write(
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
    kept = build(folder, empty="keep")
    assert [kept.prompt(i) for i in range(3)] == ["", "", "B."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "r.png"}', "line 1 has neither 'text' nor 'prompt'; there is file_name"),
        ('\n{"text": "a"}', "line 2 has no 'file_name'; there is text"),
        ('{"file_name": "r.png", "text": 3}', "line 1: 'text' must be text, got 3"),
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1: expected a mapping"),
        ("", "no image in .* has a caption"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_a_folder_without_metadata(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        build(tmp_path)
    with pytest.raises(ValueError, match="one prompt per file, got 1 files and 0 prompts"):
        Folder([tmp_path], [])


def test_prompts_of_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\ntwo\u2028more\n\nthree\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two\u2028more", "", "three"]
    rows = [{"prompt": "A.\n\nB."}, {"text": "\u2028C"}, {"text": "", "prompt": "x"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", "utf-8")
    assert read_prompts(tmp_path / "b.jsonl") == ["A.\n\nB.", "C", ""]
    assert read_prompts(str(tmp_path / "a.txt"))[0] == "one"


def test_prompts_as_data(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    found = data.build({"name": "prompts", "file": str(tmp_path / "a.txt")})
    assert [found[i] for i in range(len(found))] == [{"prompt": "one"}, {"prompt": "two"}]
    assert "1 of 3 prompts" in caplog.text
    assert (found.has_images, Scenes.has_images) == (False, True)
    assert len(data.build({"name": "prompts", "file": str(tmp_path / "a.txt"), "empty": "keep"})) == 3


def test_prompt_files_that_cannot_be_used(tmp_path):
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"from a \.txt or a \.jsonl file"):
        read_prompts(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_prompts(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="holds no prompts"):
        data.build({"name": "prompts", "file": str(tmp_path / "a.txt")})
    with pytest.raises(ValueError, match="there are no prompts"):
        Prompts([])


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/{outside}/secret.png", ".."])
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    picture(tmp_path / "secret.png", "red")
    folder = tmp_path / "in"
    folder.mkdir()
    name = name.replace("/{outside}", str(tmp_path))
    with pytest.raises(ValueError, match=f"{re.escape(name)}' leads out of"):
        inside(folder, name)
    write(folder, [{"file_name": name, "text": "A."}])
    with pytest.raises(ValueError, match=r"line 1: .* leads out of"):
        build(folder)
    write(folder, [{"image_0": "a.png", "image_1": name, "text": "A.", "label_0": 1, "label_1": 0}])
    with pytest.raises(ValueError, match=r"line 1: .* leads out of"):
        data.build({"name": "pairs", "folder": str(folder)})


def test_names_inside_a_folder_and_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inside("a", "b/../c..png") == Path("a/c..png")
    assert inside("a", str(tmp_path / "a" / "c.png")) == Path("a/c.png")
    assert inside(tmp_path, "x.png") == tmp_path / "x.png"
    assert inside("/", "/etc/x") == Path("/etc/x")
    with pytest.raises(ValueError, match="leads out"):
        inside("a", str(tmp_path / "ab" / "c.png"))
    (tmp_path / "farm").mkdir()
    picture(tmp_path / "far.png", "red")
    (tmp_path / "farm" / "near.png").symlink_to(tmp_path / "far.png")
    write(tmp_path / "farm", [{"file_name": "near.png", "text": "A."}])
    assert build(tmp_path / "farm")[0]["image"][0].min() == 1


def test_captions_in_a_table(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\nr.png,"Red, all."\ng.png,\nb.png,Blue.\n', "utf-8-sig")
    found = build(folder)
    assert [found.prompt(i) for i in range(2)] == ["Red, all.", "Blue."] and len(found) == 2
    (folder / "metadata.csv").write_text("file_name,text\nr.png,Red, all.\n")
    with pytest.raises(ValueError, match="line 2 has more cells"):
        build(folder)
    (folder / "metadata.csv").write_text("file,text\nr.png,Red.\n")
    with pytest.raises(ValueError, match="line 2 has no 'file_name'; there is file, text"):
        build(folder)
    (folder / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match=r"metadata\.jsonl and .*metadata\.csv; remove one"):
        build(folder)


def test_captions_beside_images(folder, caplog):
    (folder / "metadata.jsonl").unlink()
    (folder / "more").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("more/y.jpg", ".hidden/z.png"):
        picture(folder / name, "yellow")
        (folder / name).with_suffix(".txt").write_text("Yellow.")
    (folder / "r.txt").write_text(" Red.\nAll of it.\n")
    (folder / "g.txt").write_text("")
    found = build(folder)
    assert [found.prompt(i) for i in range(len(found))] == ["Yellow.", "Red.\nAll of it."]
    assert "1 of 4 images" in caplog.text and "1 of 3 captions" in caplog.text
    assert len(build(folder, empty="keep")) == 3


def test_a_deeply_nested_line_is_no_json(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        build(tmp_path)


def test_missing_metadata_say_what_they_should_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'metadata\.jsonl; .*"file_name": .*metadata\.csv.*\.txt'):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'metadata\.jsonl; .*"image_0": '):
        data.build({"name": "pairs", "folder": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="no folder"):
        build(tmp_path / "none")


def test_images_that_are_scaled_up_are_counted(folder, caplog):
    found = build(folder, resolution=9)
    for i in range(12):
        _ = found[i % 3]
    conditioning = [r.getMessage() for r in caplog.records]
    assert (
        len(conditioning) == 2
        and conditioning[0].startswith("1 of the images")
        and conditioning[1].startswith("10 of the images")
    )
    assert "resolution=9" in conditioning[0] and "8 by 8" in conditioning[0]
    caplog.clear()
    _ = build(folder, resolution=8)[0]
    assert not caplog.records


def test_the_resolution_is_the_backbones_own(folder, tmp_path_factory):
    from tiny import tiny_sd

    from longalign.compose import build_from_config

    base = str(tiny_sd(tmp_path_factory.mktemp("sd")))
    run = {"backbone": {"name": "sd", "checkpoint": base}, "data": {"name": "folder", "folder": str(folder)}}
    run |= {"encoder": {"name": "clip-segment", "checkpoint": base}, "trainer": "align", "output": "x"}
    assert build_from_config(run).data[0]["image"].shape == (3, 64, 64)
    assert build_from_config(override(run, {"data.resolution": 16})).data[0]["image"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="resolution null is the backbone's own"):
        build(folder, resolution=None)


def test_half_a_surrogate_pair_is_no_text(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "r.png", "text": "A."}\n{"file_name": "g.png", "text": "\\ud800"}'
    )
    with pytest.raises(ValueError, match="line 2: 'text' is not valid text"):
        build(folder)
