"""Ablations on the tiny world: cells, runs, interruption, failures, repeated calls, tables."""

import csv
import json
import os
import re
import signal

import numpy as np
import pytest

import longalign
from longalign import ConfigError, ablate
from longalign.ablation import schedule, worker
from longalign.ablation.cells import make_cells, parse_vary, read_cells
from longalign.ablation.measure import merge, seed_note
from longalign.cli.main import main
from longalign.config.run import load_config, to_yaml
from longalign.encoders.base import PromptReport
from longalign.evaluation.bootstrap import bootstrap
from longalign.evaluation.table import MetricTable
from longalign.loop.run import Run
from longalign.testing.tiny import tiny_sd

SAMPLING = {"prompts": ["abcd", "efgh"], "num_steps": 2, "guidance": 2.0, "batch_size": 2}


def brightness(images, prompts):
    return {"brightness": images.mean((1, 2, 3))}


@pytest.fixture
def tiny(world, tmp_path, monkeypatch):
    """A function that runs an ablation of two steps per run."""
    config = world.align_config("unused", steps=2, save_every=1)

    def report(encoder, prompts):
        return [PromptReport((prompt,), (4,)) for prompt in prompts]

    monkeypatch.setattr(world.ToyEncoder, "report", report)

    def call(changes=None, **options):
        base = longalign.override(config, changes or {})
        settings = {"vary": {"loop.lr": [0.01, 0.02]}, "seeds": 2, "metrics": [brightness], **SAMPLING, **options}
        return ablate(base, output=tmp_path / "out", **settings)

    return call


@pytest.fixture
def trained(monkeypatch):
    """Output folders of the runs that were trained, in order."""
    outputs, train = [], Run.train

    def record(run, interrupted):
        outputs.append("/".join(run.output.parts[-3:-1]))
        return train(run, interrupted)

    monkeypatch.setattr(Run, "train", record)
    return outputs


def record_of(result):
    return json.loads((result.output / "ablation.json").read_text())


def test_ablate_compares_cells_paired_over_prompts_and_seeds(tiny, trained, tmp_path):
    rows = [{"prompt": prompt, "labels": {"letter": prompt[0]}} for prompt in SAMPLING["prompts"]]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = tiny(images=2, prompts=str(tmp_path / "set.jsonl"))
    table = result.table
    assert trained == ["lr=0.01/seed-0", "lr=0.02/seed-0", "lr=0.01/seed-1", "lr=0.02/seed-1"]
    assert table.models == ["lr=0.01", "lr=0.02"] and table.training_seeds == [0] * 4 + [1] * 4
    assert table.seeds == [0, 1] * 4 and table.prompts == ["abcd", "abcd", "efgh", "efgh"] * 2
    assert table.labels == {"letter": [("a",), ("a",), ("e",), ("e",)] * 2}
    values = {m: table.row(m, "brightness") for m in table.models}
    assert len(np.unique(values["lr=0.01"])) == 8  # each training seed, prompt and noise
    expected = (values["lr=0.02"] - values["lr=0.01"]).mean()
    assert table.difference("lr=0.02", "brightness").mean == pytest.approx(expected)
    record = record_of(result)
    assert record["seeds"] == [0, 1] and [cell["changes"] for cell in record["cells"]] == [
        {"loop.lr": 0.01}, {"loop.lr": 0.02},
    ]  # fmt: skip
    run = record["cells"][1]["runs"][1]
    assert run["status"] == "finished" and run["folder"] == "lr=0.02/seed-1"
    assert len(list((result.output / run["images"]).glob("*.png"))) == 4
    assert (result.output / run["checkpoint"]).is_dir()
    configs = [load_config(result.output / run["folder"] / "train" / "checkpoint-000002") for run in
               record["cells"][0]["runs"]]  # fmt: skip
    assert set(longalign.diff(*configs)) == {"seed", "output"}
    assert MetricTable.from_dict(json.loads((result.output / "table.json").read_text())).text() == table.text()
    rows = list(csv.DictReader((result.output / "table.csv").read_text().splitlines()))
    assert len(rows) == 16 and rows[4]["training_seed"] == "1"
    assert "by training seed" in (result.output / "table.md").read_text()
    page = (result.output / "report.html").read_text()
    assert "lr=0.02" in page and "<code>loop.lr=0.02</code>" in page and page.count('<article class="example"') == 4


def test_ablate_runs_only_new_cells_and_seeds(tiny, trained):
    first = tiny(seeds=1)
    assert first.table.training_seeds == () and first.table.note == seed_note(1)
    del trained[:]
    result = tiny(vary={"loop.lr": [0.01, 0.02, 0.03]}, seeds=2)
    assert trained == ["lr=0.03/seed-0", "lr=0.01/seed-1", "lr=0.02/seed-1", "lr=0.03/seed-1"]
    assert result.table.pairs == [("lr=0.02", "lr=0.01"), ("lr=0.03", "lr=0.01")]
    del trained[:]
    assert tiny().table.models == ["lr=0.01", "lr=0.02"] and not trained


def test_ablate_resumes_interrupted_run(tiny, monkeypatch, trained):
    take_step, steps = Run._take_step, []

    def stop(run):
        take_step(run)
        steps.append((run.config.seed, run.config.loop.lr, run.step))
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "_take_step", stop)
    result = tiny()
    assert result.interrupted and result.table is None
    statuses = [run["status"] for cell in record_of(result)["cells"] for run in cell["runs"]]
    assert statuses == ["finished", "pending", "pending", "pending"]
    result = tiny()
    assert steps[3] == (0, 0.02, 2) and len(steps) == 8  # continues with the second step
    assert result.table.interval("lr=0.02", "brightness").count == 4


def test_ablate_ctrl_c_while_sampling_stops(tiny, monkeypatch, trained):
    from longalign.inference import sampling

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "write_images", stop)
        assert tiny().interrupted
    assert trained == ["lr=0.01/seed-0"]
    assert not tiny().interrupted


def test_ablate_reports_failed_run_and_repeats_it(tiny, monkeypatch):
    take_step = Run._take_step

    def fail(run):
        if run.loop.lr == 0.01 and run.config.seed == 1:
            raise RuntimeError("no step today")
        take_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_take_step", fail)
        result = tiny()
    assert list(result.failed) == ["lr=0.01, seed 1"] and "no step today" in result.failed["lr=0.01, seed 1"]
    failed = record_of(result)["cells"][0]["runs"][1]
    assert failed["status"] == "failed" and "no step today" in failed["error"]
    difference = result.table.difference("lr=0.02", "brightness")
    assert difference.count == 2 and result.table.interval("lr=0.02", "brightness").count == 4
    result = tiny()
    assert not result.failed and result.table.difference("lr=0.02", "brightness").count == 4


def test_ablate_rejects_changed_settings_in_same_folder(tiny, trained):
    tiny(seeds=1)
    with pytest.raises(ValueError, match=r"(?s)trainer\.caption_dropout.*0\.3.*0\.1"):
        tiny({"trainer.caption_dropout": 0.1})
    with pytest.raises(ValueError, match=r"sampling\.num_steps.*2.*3"):
        tiny(num_steps=3)
    with pytest.raises(ValueError, match=r"lr=0\.01.*loop\.lr.*0\.01.*0\.5"):
        tiny(vary=None, cells={"lr=0.01": {"loop.lr": 0.5}})
    assert len(trained) == 2


def test_ablate_checks_all_cells_before_first_run(tiny, trained, tmp_path):
    with pytest.raises(ConfigError) as raised:
        tiny(vary=None, cells={"a": {}, "b": {"loop.lrr": 1}, "c": {"loop.steps": "many"}, "d": {"seed": 3}, "e": {}})
    assert [path for path, _ in raised.value.errors] == ["b: loop.lrr", "c: loop.steps", "d: seed", "e"]
    assert "remove" in raised.value.errors[2][1] and not trained and not (tmp_path / "out").exists()


def test_ablate_without_training_measures_base_models(tiny, trained):
    cells = {"plain": {}, "no-adapter": {"encoder.with_adapter": False, "trainer": None}}
    table = tiny(vary=None, cells=cells, train=False).table
    assert not trained and table.models == ["plain", "no-adapter"]
    assert table.note == "" and table.interval("plain", "brightness").count == 2


def test_ablate_compares_untrained_cell_with_each_training_seed(tiny, trained):
    result = tiny(vary=None, cells={"base": {"trainer": None}, "trained": {}})
    assert trained == ["trained/seed-0", "trained/seed-1"]
    values = result.table.row("base", "brightness")
    assert values[:2].tolist() == values[2:].tolist()
    assert result.table.difference("trained", "brightness").count == 4


def test_ablate_files_and_errors_contain_no_credentials(tiny, monkeypatch):
    url = "https://me:secret@host"
    fit, trained = worker.fit, []
    monkeypatch.setattr(worker, "fit", lambda config, **options: trained.append(config) or fit(config, **options))

    def fail(run):
        if run.loop.lr == 0.02:
            raise RuntimeError(f"no answer from {url}")
        take_step(run)

    take_step = Run._take_step
    monkeypatch.setattr(Run, "_take_step", fail)
    prompts = [f"see {url}"]
    result = tiny({"monitor": {"prompts": prompts, "num_steps": 1}}, seeds=1)
    assert {config.monitor.prompts for config in trained} == {tuple(prompts)}
    files = ["ablation.json", "report.html", "lr=0.02/seed-0/result.json", "lr=0.02/seed-0/job.json"]
    texts = [(result.output / name).read_text() for name in files]
    assert all("***@host" in text and "secret" not in text for text in texts)
    assert "secret" not in result.failed["lr=0.02, seed 0"]
    assert tiny({"monitor": {"prompts": prompts, "num_steps": 1}}, seeds=1).failed


def test_ablate_samples_best_checkpoint_of_run(tiny, monkeypatch):
    monkeypatch.setattr(worker, "best_checkpoint", lambda run: run / "checkpoint-000001")
    result = tiny(vary={"loop.lr": [0.01]}, seeds=1)
    run = json.loads((result.output / "lr=0.01/seed-0/result.json").read_text())
    assert run["checkpoint"] == "train/checkpoint-000001"


def test_ablate_without_held_out_prompts_raises(tiny):
    with pytest.raises(ConfigError, match="'squares' has no held-out prompts"):
        tiny(prompts=None)


def test_ablate_rejects_repeated_metrics_before_first_run(tiny, trained):
    with pytest.raises(ConfigError, match=r"metrics: two metrics .* gauges"):
        tiny(metrics=["gauges", "gauges"])
    assert not trained


def test_make_cells_names_cells_by_varied_keys(world):
    base = load_config(world.reward_config("unused"))
    cells = make_cells(base, {"loop.lr": [0.1, 0.2], "trainer.lora.rank": [2, 4]})
    assert [cell.name for cell in cells] == ["lr=0.1,rank=2", "lr=0.1,rank=4", "lr=0.2,rank=2", "lr=0.2,rank=4"]
    listed = make_cells(
        base, None, [{}, {"loop.betas": [0.5, 0.9]}, {"encoder": {"name": "toy-encoder", "dropout": 0}}]
    )
    names = [cell.name for cell in listed]
    assert names[:2] == ["base", "betas=[0.5,0.9]"] and names[2].startswith("encoder=toy-encoder-")
    assert listed[1].folder.startswith("betas=_0.5,0.9") and len({cell.folder for cell in listed}) == 3
    (long,) = make_cells(base, None, {"x" * 100: {}})
    assert len(long.folder) == 60


def test_make_cells_gives_other_inputs_their_own_cache(world):
    base = load_config({**world.align_config("unused"), "cache": {"folder": "c"}})
    same, other = make_cells(base, None, [{"loop.lr": 0.5}, {"encoder.dropout": 0.2}])
    assert same.config.cache.folder == "c" and other.config.cache.folder.startswith("c/")


@pytest.mark.parametrize(
    ("items", "values"),
    [
        (["a=all,first"], {"a": ["all", "first"]}),
        (["a=0,1e-4", "b=[1,2],[3,4]"], {"a": [0, 1e-4], "b": [[1, 2], [3, 4]]}),
        (["a={name: x, y: 1},null"], {"a": [{"name": "x", "y": 1}, None]}),
    ],
)
def test_parse_vary(items, values):
    assert parse_vary(items) == values


@pytest.mark.parametrize("items", [["a"], ["a="], ["=1"], ["a=1", "a=2"], ["a={"]])
def test_parse_vary_invalid_raises(items):
    with pytest.raises(ConfigError):
        parse_vary(items)


def test_read_cells(tmp_path):
    path = tmp_path / "cells.yaml"
    path.write_text("cells:\n  slow: {loop.lr: 1e-5}\n")
    assert read_cells(path) == {"cells": {"slow": {"loop.lr": 1e-5}}}
    path.write_text("grid: {}\n")
    with pytest.raises(ConfigError, match="grid"):
        read_cells(path)


def test_merge_averages_statistics_of_sets_over_training_seeds(world):
    (cell,) = make_cells(load_config(world.align_config("unused")), None, {"a": {}})
    sets = {"0": {"fd": np.array([1.0, 1, 1])}, "1": {"fd": np.array([3.0, 3, 3])}}
    table = MetricTable({"0": {}, "1": {}}, ["p"] * 2, [0, 1], sets=sets)
    merged = merge(table, {"0": (cell, 0), "1": (cell, 1)}, [0, 1])
    assert merged.interval("a", "fd").mean == 2.0
    assert set(merged.sets["a"]["fd"][1:]) <= {1.0, 3.0}  # each bootstrap sample has one of two seeds


def test_bootstrap_resamples_training_seeds():
    """Ten prompts without variation: only the two training seeds vary, and each bootstrap sample resamples them."""
    values, groups, blocks = np.repeat([0.0, 1.0], 10), [str(i) for i in range(10)] * 2, np.repeat([0, 1], 10)
    crossed = bootstrap(values, groups, blocks=blocks.tolist())
    assert (crossed.mean, crossed.low, crossed.high, crossed.prompts) == (0.5, 0.0, 1.0, 10)
    constant = bootstrap(np.ones(20), groups, blocks=blocks.tolist())
    assert (constant.low, constant.high) == (1.0, 1.0)
    prompts = np.tile(np.arange(10.0), 2)  # seeds do not vary: the interval is that of one seed
    both, one = bootstrap(prompts, groups, blocks=blocks.tolist()), bootstrap(prompts[:10], groups[:10])
    assert (both.low, both.high) == pytest.approx((one.low, one.high))


SCENES = {
    "backbone": {"name": "sd"}, "encoder": {"name": "clip-segment", "max_tokens": 240},
    "trainer": {"name": "align", "lora": {"rank": 2}}, "data": {"name": "scenes", "words": [30, 40], "size": 50},
    "loop": {"steps": 1, "batch_size": 2},
}  # fmt: skip
OPTIONS = ["--num-prompts", "2", "--num-steps", "1", "--metric", "facts"]


@pytest.fixture
def scenes(tmp_path):
    """Config file of a tiny model on the scenes."""
    sd = str(tiny_sd(tmp_path / "sd"))
    parts = {key: {**SCENES[key], "checkpoint": sd} for key in ("backbone", "encoder")}
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(load_config({**SCENES, **parts})))
    return path


def test_ablate_command_measures_facts_of_held_out_captions(scenes, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["ablate", str(scenes), "--vary", "encoder.sot=all,first", "--seeds", "1", "--output", str(output)]
    assert main([*command, *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert "sot=first - sot=all" in out and seed_note(1) in out
    assert main([*command, *OPTIONS, "loop.steps=2"]) == 2
    assert re.search(r"base\.loop\.steps.*1.*2", capsys.readouterr().err)
    assert main(["ablate", str(scenes), "--vary", "encoder.sott=1", *OPTIONS, "--output", str(tmp_path / "b")]) == 2
    assert "encoder.sott" in capsys.readouterr().err


def test_ablate_command_returns_1_for_failed_run(scenes, tmp_path, capsys, monkeypatch):
    def broken(*args, **options):
        raise ValueError("no model")

    monkeypatch.setattr(worker, "fit", broken)
    options = ["--vary", "encoder.sot=all,first", *OPTIONS, "--output", str(tmp_path / "out")]
    assert main(["ablate", str(scenes), *options]) == 1
    assert "failed: sot=first, seed 2: no model" in capsys.readouterr().err


@pytest.mark.processes
def test_ablate_jobs_run_in_processes(scenes, tmp_path, capsys):
    """One cell fails when its model is loaded, the other one finishes."""
    cells = tmp_path / "cells.yaml"
    cells.write_text("cells: {all: {}, broken: {init_from: nobody/nothing}}\n")
    options = ["--cells", str(cells), "--seeds", "1", "--jobs", "2", "--output", str(tmp_path / "out"), *OPTIONS]
    assert main(["ablate", str(scenes), *options]) == 1
    captured = capsys.readouterr()
    assert "failed: broken, seed 0" in captured.err and "2 prompts" in captured.out
    assert (tmp_path / "out" / "all" / "seed-0" / "log.txt").exists()


@pytest.mark.processes
def test_ablate_jobs_stop_after_signal(scenes, tmp_path, monkeypatch):
    start = schedule._start

    def interrupt(*args):
        process = start(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(schedule, "_start", interrupt)
    cells = [{"encoder.sot": "all"}, {"encoder.sot": "first"}]
    result = ablate(scenes, cells=cells, metrics=["facts"], output=tmp_path / "out", jobs=2, num_prompts=2)
    assert result.interrupted and not result.failed
    assert {run["status"] for cell in record_of(result)["cells"] for run in cell["runs"]} == {"pending"}
