"""Copies of images where official scorers read them."""

import json

import pytest
import torch
from PIL import Image

from longalign.cli.main import main
from longalign.data.prompts.formats import Prompt
from longalign.data.prompts.sets import PromptSet
from longalign.evaluation.layouts import LAYOUTS, arrange
from longalign.image_folder import write_images

RED, GREEN, BLUE, GREY = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0.4, 0.4, 0.4)
COLOURS = (RED, GREEN, BLUE, GREY)


def generated(folder, prompts, seeds=(0, 1, 2, 3), size=8):
    """A folder as `longalign generate` writes it, with a colour for each seed."""

    def sample(texts, batch_seeds):
        return torch.stack([torch.tensor(COLOURS[s])[:, None, None].expand(3, size, size) for s in batch_seeds])

    write_images(folder, prompts.texts, sample, seeds=seeds, negative=None, config={}, settings={})
    return folder


def prompt_set(name, *prompts):
    return PromptSet(name, prompts)


def tiif(kind, index, length):
    row = {"type": kind, "index": index, "length": length}
    return Prompt(f"{kind}/{index}/{length}", f"{kind} {length}", {"length": (length,)}, f"{kind}/{index}", row)


def unigenbench(index, length):
    return Prompt(f"{length}/{index}", f"prompt {index} {length}", {"length": (length,)}, str(index))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixel(path, x, y) -> tuple:
    with Image.open(path) as image:
        return tuple(image.convert("RGB").crop((x, y, x + 1, y + 1)).tobytes())


def test_dpg_bench_samples_are_a_grid(tmp_path):
    prompts = prompt_set("dpg-bench", Prompt("whoops5", "a"), Prompt("10", "b"))
    out = tmp_path / "out"
    written = arrange(generated(tmp_path / "in", prompts), prompts, out, "ours")
    assert files(out) == ["ours/10.png", "ours/whoops5.png"] and set(written) == {out / name for name in files(out)}
    with Image.open(written[0]) as image:
        assert image.size == (16, 16)
    colours = [pixel(written[0], x, y) for y in (2, 12) for x in (2, 12)]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (102, 102, 102)]


def test_unigenbench_images_are_copied_with_metadata(tmp_path):
    prompts = prompt_set("unigenbench", unigenbench(7, "short"), unigenbench(7, "long"))
    folder, out = generated(tmp_path / "in", prompts), tmp_path / "out"
    arrange(folder, prompts, out, "ours")
    assert files(out) == [f"ours_{length}/7_{i}.png" for length in ("long", "short") for i in range(4)]
    assert (out / "ours_long/7_2.png").read_bytes() == (folder / "00001-2.png").read_bytes()


def test_longbench_image_is_a_jpeg_of_the_first_seed(tmp_path, caplog):
    prompts = prompt_set("longbench-t2i", Prompt("0", "a"), Prompt("1", "b"))
    out = tmp_path / "out"
    arrange(generated(tmp_path / "in", prompts, seeds=(2, 0)), prompts, out, "ours")
    assert files(out) == [f"outputs/ours/{n}/step0/generated_image_0.jpg" for n in (0, 1)]
    with Image.open(out / files(out)[0]) as image:
        assert image.format == "JPEG"
    red, green, blue = pixel(out / files(out)[0], 4, 4)
    assert blue > 240 > 15 > max(red, green)  # seed 2
    assert "1 of 2 images" in caplog.text


def test_tiif_folders_by_type_model_and_length(tmp_path):
    prompts = prompt_set("tiif", *(tiif("action+3d", 0, length) for length in ("short", "long")))
    arrange(generated(tmp_path / "in", prompts, seeds=(1,)), prompts, tmp_path / "out", "ours")
    assert files(tmp_path / "out") == [f"action+3d/ours/{length}_description/0.png" for length in ("long", "short")]


def test_geneval_writes_each_prompts_metadata(tmp_path):
    rows = [{"tag": "colors", "include": [{"class": "cat"}], "prompt": text} for text in ("a", "b")]
    prompts = prompt_set("geneval", *(Prompt(f"{i:05d}", row["prompt"], row=row) for i, row in enumerate(rows)))
    arrange(generated(tmp_path / "in", prompts, seeds=(0, 3)), prompts, tmp_path / "out", "ours")
    names = ["metadata.jsonl", "samples/0000.png", "samples/0001.png"]
    assert files(tmp_path / "out") == [f"ours/{n:05d}/{name}" for n in (0, 1) for name in names]
    assert json.loads((tmp_path / "out/ours/00001/metadata.jsonl").read_text()) == rows[1]


def test_detailmaster_lists_the_image_ids(tmp_path):
    prompts = prompt_set("detailmaster", Prompt("docci_a.jpg", "a"), Prompt("ln_coco_1.jpg", "b"))
    arrange(generated(tmp_path / "in", prompts, seeds=(0,)), prompts, tmp_path / "out", "ours")
    assert files(tmp_path / "out") == ["ours.json", "ours/00000.png", "ours/00001.png"]
    assert json.loads((tmp_path / "out/ours.json").read_text()) == [
        {"output_image_name": "00000.png", "image_id": "docci_a.jpg"},
        {"output_image_name": "00001.png", "image_id": "ln_coco_1.jpg"},
    ]


def test_oneig_grids_by_category(tmp_path):
    prompt = Prompt("Portrait/003", "a", row={"category": "Portrait"})
    folder = generated(tmp_path / "in", prompt_set("oneig", prompt))
    arrange(folder, prompt_set("oneig", prompt), tmp_path / "out", "ours")
    assert files(tmp_path / "out") == ["human/ours/003.webp"]
    assert pixel(tmp_path / "out/human/ours/003.webp", 12, 2) == (0, 255, 0)
    unknown = prompt_set("oneig", Prompt("x/003", "a", row={"category": "x"}))
    with pytest.raises(ValueError, match=r"'x'.*Portrait"):
        arrange(folder, unknown, tmp_path / "out", "ours")


def test_arrange_again_replaces_files_and_keeps_other_models(tmp_path):
    prompts = prompt_set("longbench-t2i", Prompt("0", "a"))
    out = tmp_path / "out"
    folders = {seed: generated(tmp_path / str(seed), prompts, seeds=(seed,)) for seed in (0, 1)}
    (first,) = arrange(folders[0], prompts, out, "ours")
    arrange(folders[0], prompts, out, "other")
    before = (out / "outputs/other/0/step0/generated_image_0.jpg").read_bytes()
    assert first.read_bytes() == before
    assert arrange(folders[1], prompts, out, "ours") == [first] and first.read_bytes() != before
    assert (out / "outputs/other/0/step0/generated_image_0.jpg").read_bytes() == before
    assert len(files(out)) == 2


def test_arrange_skips_prompts_without_images(tmp_path, caplog):
    prompts = prompt_set("longbench-t2i", Prompt("0", "a"), Prompt("1", "b"), Prompt("2", "c"))
    some = PromptSet(prompts.name, prompts.prompts[:2])
    assert len(arrange(generated(tmp_path / "in", some, seeds=(0,)), prompts, tmp_path / "out", "ours")) == 2
    assert "1 of 3 prompts" in caplog.text


def test_arrange_rejects_too_few_images(tmp_path):
    prompts = prompt_set("dpg-bench", Prompt("whoops5", "a"))
    with pytest.raises(ValueError, match=r"4 images.*whoops5.*\b1\b.*--seed 0 1 2 3"):
        arrange(generated(tmp_path / "in", prompts, seeds=(0,)), prompts, tmp_path / "out", "ours")
    assert not (tmp_path / "out").exists()


def test_arrange_rejects_images_of_other_prompts(tmp_path):
    prompts = prompt_set("longbench-t2i", Prompt("0", "a"))
    folder = generated(tmp_path / "in", prompts, seeds=(0,))
    with pytest.raises(ValueError, match=r"00000-0\.png"):
        arrange(folder, prompt_set("longbench-t2i", Prompt("0", "b")), tmp_path / "out", "ours")
    (folder / "00000-0.png").rename(folder / "x.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "prompt": "a", "seed": 0}))
    with pytest.raises(ValueError, match=r"x\.png"):
        arrange(folder, prompts, tmp_path / "out", "ours")


def test_arrange_rejects_names_that_leave_the_folder_or_collide(tmp_path):
    prompts = prompt_set("dpg-bench", Prompt("../../x", "a"))
    folder = generated(tmp_path / "in", prompts)
    with pytest.raises(ValueError, match=r"'ours/\.\./\.\./x\.png'"):
        arrange(folder, prompts, tmp_path / "out", "ours")
    prompts = prompt_set("dpg-bench", Prompt("x", "a"), Prompt("X", "b"))
    folder = generated(tmp_path / "in2", prompts)
    with pytest.raises(ValueError, match=r"ours/x\.png"):
        arrange(folder, prompts, tmp_path / "out", "ours")
    for model in ("", "..", "a/b"):
        with pytest.raises(ValueError, match=f"'{model}'"):
            arrange(folder, prompts, tmp_path / "out", model)
    with pytest.raises(ValueError, match=r"'dsg'.*dpg-bench"):
        arrange(folder, prompt_set("dsg", Prompt("x", "a")), tmp_path / "out", "ours")
    assert not (tmp_path / "out").exists()


def test_arrange_command_takes_the_models_name_from_the_folder(tmp_path, capsys):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/5.txt").write_text("a fox")
    generated(tmp_path / "tuned", prompt_set("dpg-bench", Prompt("5", "a fox")))
    options = ["--prompts", f"dpg-bench:{tmp_path / 'prompts'}", "--output", str(tmp_path / "out")]
    assert main(["arrange", "--images", str(tmp_path / "tuned"), *options]) == 0
    assert files(tmp_path / "out") == ["tuned/5.png"] and "1 image" in capsys.readouterr().out
    assert main(["arrange", "--images", str(tmp_path / "tuned"), *options, "--model", "x"]) == 0
    assert files(tmp_path / "out") == ["tuned/5.png", "x/5.png"]


def test_layouts_are_of_known_sets():
    from longalign.data.prompts.formats import SETS

    assert set(LAYOUTS) == set(SETS) - {"plain", "dsg"}
