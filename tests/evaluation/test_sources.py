import json
from pathlib import Path

import numpy as np
import pytest
import torch

from longalign.cli.main import main
from longalign.data.scenes.config import ScenesConfig
from longalign.evaluation import sources
from longalign.evaluation.report import AblationCell
from longalign.evaluation.sentences import Sentences
from longalign.evaluation.sources import read_sources, table_data
from longalign.evaluation.table import MetricTable
from longalign.image_folder import append_images, image_row
from longalign.mini.scenes import render_batch
from longalign.runtime import Runtime

PROMPTS = ["A red fox. It sleeps.", "A blue house."]


def write_folder(folder, truncated="", seeds=(0,)):
    folder.mkdir(parents=True)
    rows = [image_row(i, p, s, truncated=truncated if i == 0 else "") for i, p in enumerate(PROMPTS) for s in seeds]
    append_images(folder, rows, [torch.full((3, 8, 8), 0.5)] * len(rows), {})
    return folder


def write_run(folder, rewards=(0.1, 0.2)):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": i, "reward": r}) for i, r in enumerate(rewards)]
    (folder / "log.jsonl").write_text("\n".join(lines))
    return folder


def write_table(folder, models=("base", "tuned")):
    folder.mkdir(parents=True, exist_ok=True)
    table = MetricTable({m: {"clip": np.array([0.1, 0.2]) * (i + 1)} for i, m in enumerate(models)}, PROMPTS, [0, 0])
    folders = {m: folder / "images" / m for m in models}
    scores = {m: [[0.1, 0.2], [0.3]] for m in models}
    sentences = Sentences([["A red fox.", "It sleeps."], ["A blue house."]], scores=scores, score_name="clip")
    data = table_data(table, folders, folder / "table.json", sentences, title="Demo", seconds={"train": 2.0})
    (folder / "table.json").write_text(json.dumps(data))
    return folder / "table.json", folders


def test_read_sources_runs_are_named(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    contents = read_sources([str(runs[0]), f"other={runs[1]}"])
    assert contents["logs"] == {"a": runs[0] / "log.jsonl", "other": runs[1] / "log.jsonl"}
    assert contents["table"] is None and contents["examples"] == [] and "a, other" in contents["title"]


def test_read_sources_single_run_has_images_of_its_monitor(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "read_config", lambda run: None)
    run = write_run(tmp_path / "run")
    for step in (0, 5, 10, 15):
        write_folder(run / "monitor" / f"{step:06d}")
    (run / "checkpoint-000010").mkdir()
    (run / "best").symlink_to("checkpoint-000010")
    contents = read_sources([str(run)])
    assert [list(e.images) for e in contents["examples"]] == [["step 0", "step 10, best", "step 15"]] * 2
    assert contents["title"] == "Report on run"
    other = write_folder(tmp_path / "other")
    with pytest.raises(ValueError, match="two folders of images are called 'other'; name them with NAME="):
        read_sources([str(other), str(other)])
    assert list(read_sources([str(run), str(other)])["examples"][0].images) == ["other"]


def test_read_sources_image_folders_without_table(tmp_path):
    base = write_folder(tmp_path / "base", truncated="It sleeps.", seeds=(0, 1))
    tuned = write_folder(tmp_path / "tuned", seeds=(1,))
    examples = read_sources([str(base), f"ours={tuned}"])["examples"]
    assert [(e.sentences, e.seed, list(e.images)) for e in examples] == [
        (["A red fox.", "It sleeps."], 1, ["base", "ours"]),
        (["A blue house."], 1, ["base", "ours"]),
    ]
    assert examples[0].truncated == {"base": {1}, "ours": set()}


def test_read_sources_table_knows_its_images_and_sentences(tmp_path):
    file, folders = write_table(tmp_path / "out")
    for folder in folders.values():
        write_folder(folder)
    contents = read_sources([str(file)], examples=1)
    (example,) = contents["examples"]
    assert example.row == 0 and example.scores == {"base": [0.1, 0.2], "tuned": [0.1, 0.2]}
    assert example.images["tuned"] == tmp_path / "out" / "images" / "tuned" / "00000-0.png"
    assert (contents["title"], contents["score_name"], contents["seconds"]) == ("Demo", "clip", {"train": 2.0})


def test_read_sources_demo_has_table_images_and_runs(tmp_path):
    _, folders = write_table(tmp_path)
    for folder in folders.values():
        write_folder(folder)
    write_run(tmp_path / "align")
    contents = read_sources([str(tmp_path)])
    assert list(contents["logs"]) == ["align"] and len(contents["examples"]) == 2


def test_read_sources_ablation(tmp_path):
    file, folders = write_table(tmp_path, ("eta=1", "eta=0"))
    for folder in folders.values():
        write_folder(folder)
    cells = []
    for name, seeds in (("eta=1", (0, 1)), ("eta=0", (0,))):
        images = str(folders[name].relative_to(tmp_path))
        runs = [{"seed": seed, "folder": f"{name}/seed-{seed}", "images": images} for seed in seeds]
        cells.append({"name": name, "changes": {"trainer.eta": int(name[-1])}, "runs": runs})
        for run in runs:
            write_run(tmp_path / run["folder"] / "train")
    (tmp_path / "ablation.json").write_text(json.dumps({"cells": cells, "table": file.name}))
    contents = read_sources([str(tmp_path)])
    assert contents["cells"] == [
        AblationCell("eta=1", ["trainer.eta=1"], (0, 1)),
        AblationCell("eta=0", ["trainer.eta=0"], (0,)),
    ]
    assert list(contents["logs"]) == ["eta=1, seed 0", "eta=1, seed 1", "eta=0"]
    assert contents["table"].models == ["eta=1", "eta=0"] and len(contents["examples"]) == 2


def test_read_sources_ablation_images_have_values_of_their_training_seed(tmp_path):
    write_folder(tmp_path / "images")
    write_folder(tmp_path / "failed")
    values = {"base": {"clip": np.array([0.1, 0.2, 0.3, 0.4])}}
    table = MetricTable(values, PROMPTS * 2, [0] * 4, training_seeds=[0, 0, 1, 1], neighbours=False)
    (tmp_path / "table.json").write_text(table.json())
    runs = [{"seed": None, "folder": name, "images": name, "status": name} for name in ("failed", "images")]
    runs[1]["status"] = "finished"
    (tmp_path / "ablation.json").write_text(json.dumps({"cells": [{"name": "base", "runs": runs}]}))
    contents = read_sources([str(tmp_path)])
    assert [example.row for example in contents["examples"]] == [0, 1]
    assert contents["examples"][0].images["base"].parent.name == "images"
    assert contents["cells"] == [AblationCell("base", [])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"table\.json is not JSON"),
        ("[]", r"table\.json contains a list"),
        ("{}", r"has no values, prompts, seeds"),
        ('{"values": {}, "prompts": [], "seeds": []}', r"has no values, prompts; expected"),
        (
            '{"values": {"a": {"m": [1, 2]}}, "prompts": ["p"], "seeds": []}',
            r"table\.json: 'm' of 'a' has shape \(2,\)",
        ),
        ('{"values": {"a": {"m": ["x"]}}, "prompts": ["p"], "seeds": []}', r"table\.json: could not convert"),
        (
            '{"values": {"a": {"m": [1]}}, "prompts": ["p"], "seeds": [], "units": {"m": {"x": 1}}}',
            r"table\.json: .*'x'",
        ),
    ],
)
def test_read_sources_invalid_table_raises(tmp_path, text, message):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sources([str(tmp_path / "table.json")])


def test_read_sources_errors_name_the_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/missing .*log\.jsonl"):
        read_sources([str(tmp_path / "missing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"/empty .*metadata\.jsonl"):
        read_sources([str(tmp_path / "empty")])
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"'run'.*NAME="):
        read_sources([str(run), str(run)])
    (tmp_path / "ablation.json").write_text('{"cells": 3}')
    with pytest.raises(ValueError, match=r"ablation\.json.*'cells'.*3"):
        read_sources([str(tmp_path)])


def test_read_sources_images_of_other_prompts_raise(tmp_path):
    base, tuned = write_folder(tmp_path / "base", seeds=(0,)), write_folder(tmp_path / "tuned", seeds=(1,))
    with pytest.raises(ValueError, match="base, tuned"):
        read_sources([str(base), str(tuned)])


def test_report_command(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    output = tmp_path / "deep" / "report.html"
    assert main(["report", str(run), "--output", str(output), "--title", "A <title>"]) == 0
    assert "report.html: 0 prompts" in capsys.readouterr().out and "A &lt;title&gt;" in output.read_text()
    assert main(["report", str(run), "--output", str(Path(tmp_path) / "report.txt")]) == 2
    assert ".html" in capsys.readouterr().err


def test_report_command_on_the_table_of_eval(tmp_path, capsys):
    data = ScenesConfig(size=2, seed=5).build(Runtime())
    scenes, captions = zip(*(data.scene(i) for i in range(2)), strict=True)
    rows = [image_row(i, caption.text, 0) for i, caption in enumerate(captions)]
    true = torch.from_numpy(render_batch(scenes)).float()
    for name, images in (("true", true), ("black", torch.zeros_like(true))):
        (tmp_path / "out" / name).mkdir(parents=True)
        append_images(tmp_path / "out" / name, rows, list(images), {})
    models = [f"{name}={tmp_path / 'out' / name}" for name in ("black", "true")]
    metric = "{name: facts, data: {name: scenes, size: 2, seed: 5}}"
    table = tmp_path / "table.json"
    assert main(["eval", "--images", *models, "--metric", metric, "--json", str(table)]) == 0
    saved = json.loads(table.read_text())
    assert saved["folders"] == {"black": "out/black", "true": "out/true"}
    assert all(all(facts) for image in saved["sentences"]["verdicts"]["true"] for facts in image)
    output = tmp_path / "report.html"
    assert main(["report", str(table), "--output", str(output)]) == 0
    assert "2 prompts" in capsys.readouterr().out
    page, count = output.read_text(), sum(len(caption.facts) for caption in captions[:1])
    assert f"true: {count} of {count} facts" in page and page.count('<article class="example"') == 2
