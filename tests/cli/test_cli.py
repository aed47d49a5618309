"""The command line: output, arguments passed on, and error messages."""

import csv
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest
import torch

from longalign.backbones.config import LoraConfig
from longalign.cli import parser
from longalign.cli.main import COMMANDS, main
from longalign.config.run import RunConfig, load_config, to_yaml
from longalign.config.solvers import SOLVERS
from longalign.data.scenes.config import SyntheticConfig
from longalign.directions import compute
from longalign.encoders.t5.config import T5Config
from longalign.evaluation import scoring
from longalign.image_io import write_png
from longalign.inference import baselines
from longalign.inference import sampling as pipeline
from longalign.loop import run as loop
from longalign.registry import rewards, trainers
from longalign.rewards.base import EmbeddingReward
from longalign.rewards.config import RewardConfig
from longalign.runtime import examples_folder
from longalign.trainers.align.config import AlignConfig

CONFIG = {
    "backbone": {"name": "sd", "checkpoint": "mini/sd"},
    "encoder": {"name": "clip-segment", "checkpoint": "mini/sd"},
    "trainer": "align",
    "data": "scenes",
}


@pytest.fixture
def yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(load_config(CONFIG)))
    return str(path)


def images(folder, values, prompts=None, seeds=None):
    """Writes a folder of single-colour images, with metadata if prompts are given."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        write_png(folder / f"{i}.png", torch.full((3, 4, 4), value))
    if prompts is not None:
        seeds = seeds or [0] * len(values)
        rows = zip(prompts, seeds, strict=True)
        lines = [json.dumps({"file_name": f"{i}.png", "prompt": p, "seed": s}) for i, (p, s) in enumerate(rows)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_light_commands_do_not_import_torch(yaml):
    commands = [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["list"],
        ["list", "--check"],
        ["describe", "encoders"],
        ["describe", "encoders", "clip-segment"],
        ["describe", "run"],
        ["--version"],
        ["examples"],
        ["train", "mini-align.yaml"],
        ["train", "--lr", "1e-4"],
        ["describe", yaml, "loop.steps=3"],
        ["train", yaml, "loop.stepz=3"],
        ["train", yaml, "trainer=reward"],
        ["generate", "--config", yaml, "--prompts", "missing.txt", "--output", "x"],
        ["score", "--reward", "denscor", "--images", "x"],
    ]
    code = f"""
import sys
import longalign
from longalign.backbones.config import LoraConfig
from longalign.cli.main import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit:
        pass
    heavy = {{'torch', 'transformers', 'diffusers', 'open_clip', 'accelerate', 'numpy'}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"  longalign {command}" in text.partition("examples:")[2]
    assert "%%" not in text


def test_python_m_longalign_runs_command():
    result = subprocess.run([sys.executable, "-m", "longalign", "list", "trainers"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "align" in result.stdout


def test_list_shows_kind_name_owner_and_target(capsys):
    assert main(["list", "encoders", "rewards", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "name", "owner", "target"]
    row = next(line for line in lines if line.startswith("encoders") and " t5 " in line)
    assert row.split()[-1] == "longalign.encoders.t5.config:T5Config"
    assert not any(line.startswith("trainers") for line in lines)
    assert main(["list", "--check"]) == 0
    capsys.readouterr()
    assert main(["list", "encoders"]) == 0
    out = capsys.readouterr().out
    assert T5Config.__doc__[:12] in out
    assert "longalign.encoders" not in out


def test_list_and_describe_fit_terminal_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    for command in (["list"], ["describe", "trainers"]):
        assert main(command) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 72
    assert main(["describe", "loop"]) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")) <= 72


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["encoder"], "clip-segment-sdxl"),
        (["encoder", "t5"], "t5 (encoders), from longalign"),
        (["clip-segment"], "clip-segment (encoders), from longalign"),
        (["denscore"], "denscore (trainers), from longalign"),
        (["loop"], "batch_size: int >= 1"),
        (["run"], "loop.batch_size: int >= 1"),
    ],
)
def test_describe_accepts_config_keys_and_part_names(words, shown, capsys):
    assert main(["describe", *words]) == 0
    assert shown in capsys.readouterr().out


def test_describe_shows_defaults_of_plugin_not_of_base_class(capsys):
    class MineConfig(AlignConfig):
        """A trainer."""

        name: Literal["mine"] = "mine"
        lora: LoraConfig | None = LoraConfig(rank=4)

    trainers.register("mine", MineConfig)
    try:
        assert main(["describe", "mine"]) == 0
    finally:
        trainers.unregister("mine")
    shown = capsys.readouterr().out
    assert "lora.rank: int >= 1 = 4" in shown
    assert "lora.scale: float > 0 = 1.0" in shown


def test_describe_part_shows_type_default_and_description(capsys):
    assert main(["describe", "data", "scenes"]) == 0
    text = capsys.readouterr().out
    assert 'style: "plain" | "referring" | "mixed" = "plain"' in text
    assert "words: [int > 0, int > 0] = [20, 250]" in text
    assert "\n    " + SyntheticConfig.__doc__.partition(" seed: ")[2][:20] in text
    main(["describe", "rewards", "reweighted"])
    text = capsys.readouterr().out
    assert "inner: one of rewards (required)" in text
    assert "omega: float >= 0 = 0.3" in text
    main(["describe", "trainers", "align"])
    assert "lora.rank: int >= 1 = 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", ["encoders", "rewards", "edits", "trainers", "data", "segmenters", "gradient_steps", "backbones"]
)
def test_describe_covers_all_parts_and_keys(kind, capsys):
    from longalign.registry import REGISTRIES

    for name in REGISTRIES[kind].names():
        assert main(["describe", kind, name]) == 0
        doc = REGISTRIES[kind].get(name).__doc__
        assert doc
        shown = capsys.readouterr().out
        assert doc.split(".")[0].split("``")[0].split("\n")[0] in shown, name
        lines = [*shown.splitlines(), ""]
        for key in REGISTRIES[kind].get(name).model_fields:
            if key != "name":
                at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}: "))
                assert lines[at + 1].startswith("    "), f"'{key}' of {name} is not described"


def test_describe_redacts_url_credentials(yaml, capsys):
    data = "data={name: hf, dataset: parquet, files: ['https://me:secret@host/a.parquet?token=secret']}"
    assert main(["describe", yaml, data]) == 0
    shown = capsys.readouterr().out
    assert "https://***@host/a.parquet?token=***" in shown
    assert "secret" not in shown


def test_error_message_redacts_url_credentials(monkeypatch, yaml, capsys):
    def train(config, runtime, resume):
        raise OSError("nothing at https://me:secret@host/a.parquet")

    monkeypatch.setattr(loop, "train", train)
    assert main(["train", yaml, "encoder.checkpoint=mini/sd"]) == 2
    assert "nothing at https://***@host/a.parquet" in capsys.readouterr().err


def test_describe_config_shows_defaults_and_overrides(yaml, capsys, tmp_path):
    assert main(["describe", yaml, "trainer.lora.rank=4"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "shown.yaml")
    assert config.trainer.lora.rank == 4
    assert config.loop == load_config(CONFIG).loop


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "encodder"], "'encodder'.*'encoders'"),
        (["describe", "encoders", "clip-segmen"], "'clip-segmen'.*'clip-segment'"),
        (["describe", "encoders", "t5", "longclip"], "got encoders t5 longclip"),
        (["list", "reward"], "'reward'.*'rewards'"),
        (["train", "nowhere.yaml"], r"no config file nowhere\.yaml"),
        (["generate", "--config", "YAML", "--prompt", "a", "--output", "YAML"], r"run\.yaml .*expected a folder"),
        (["generate", "--config", "YAML", "--prompt", "a", "--output", "YAML/x"], r"run\.yaml .*expected a folder"),
        (
            ["generate", "--config", "YAML", "--prompt", "a", "--output", "x", "--seed", "3", "3"],
            r"seeds.*\b3\b",
        ),
        (["train", "YAML", "steps"], "steps: .*path=value"),
        (["train", "YAML", "loop.stepz=3"], r"loop\.stepz: .*'steps'"),
        (["train", "YAML", "--resume-from", "nowhere"], r"no checkpoint in nowhere\b"),
        (["score", "--reward", "clip", "--images", "nowhere.png"], r"no image nowhere\.png"),
        (["score", "--reward", "{name: clip, chekpoint: x}", "--images", "a.png"], "chekpoint: .*'checkpoint'"),
        (["eval", "--reward", "clip", "--images", "folder"], r"--images .*NAME=.*'folder'"),
        (["eval", "--reward", "clip", "--images", "a=nowhere"], r"nowhere.metadata\.jsonl.*`longalign generate`"),
        (["score", "--reward", "clip", "--images", "a.png", "--seed", "1"], "--seed .*generating"),
        (["eval", "--reward", "clip", "--images", "a=b", "--dtype", "float16"], "--dtype .*generating"),
        (["compute-direction", "--reward", "clip", "--prompts", "a.csv", "--output", "x"], r"\.txt .*\.jsonl"),
        (["generate", "--checkpoint", "nowhere", "--prompt", "a", "--output", "x"], r"no checkpoint in nowhere\b"),
    ],
)
def test_invalid_input_exits_with_one_message(arguments, message, yaml, capsys):
    assert main([a.replace("YAML", yaml) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.startswith(f"longalign {arguments[0]}: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["--traceback", "train", "nowhere.yaml"], ["train", "nowhere.yaml", "--traceback"]]
)
def test_traceback_option_raises_the_error(arguments):
    with pytest.raises(FileNotFoundError):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "run.yaml"], "'trian'.*'train'"),
        ([], "expected a command: train, "),
        (["train"], "required: config\n"),
        (["train", "run.yaml", "--lr", "1e-4"], r"no option --lr; .*path=value, .*loop\.lr="),
        (["train", "run.yaml", "--loop.lr=1e-4"], r"no option --loop\.lr; .* loop\.lr="),
        (["train", "run.yaml", "--resme"], "--resme; .*'--resume'"),
        (["generate", "--promts", "a.txt"], "--promts; .*'--prompts'"),
        (["generate", "--seed", "-1"], r"--seed: .*0 to 2\^64 - 1, got '-1'"),
        (["generate", "--seed", str(2**64)], rf"--seed: .*0 to 2\^64 - 1, got '{2**64}'"),
        (["generate", "--guidance", "nan"], "--guidance: .*got 'nan'"),
        (["train", "run.yaml", "--device", "gpu"], "--device: .*cpu, cuda, cuda:1 or mps, got 'gpu'"),
    ],
)
def test_misspelt_arguments_exit_with_suggestion(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_version_option_prints_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"longalign {version('longalign')}\n"


def test_error_report_waits_for_first_process(monkeypatch, capsys):
    events = []
    monkeypatch.setattr(parser.time, "sleep", lambda seconds: events.append(capsys.readouterr().err))
    for rank, waits in (("0", 0), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", "nowhere.yaml"]) == 2
        assert events == [""] * waits  # the sleep comes before the report
        assert capsys.readouterr().err.count("no config file") == 1


def test_out_of_memory_message_suggests_options(yaml, monkeypatch, capsys):
    def generate(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")

    monkeypatch.setattr(pipeline, "generate", generate)
    assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x"]) == 2
    err = capsys.readouterr().err
    assert "Tried to allocate 2 GiB" in err and "--batch below 8" in err and "--dtype bfloat16" in err
    assert "Details" not in err


def test_missing_package_is_named(yaml, monkeypatch, capsys):
    def generate(*args, **settings):
        import no_such_package.inside  # noqa: F401  # type: ignore[import-not-found]

    monkeypatch.setattr(pipeline, "generate", generate)
    assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x"]) == 2
    assert "'no_such_package'" in capsys.readouterr().err


def test_unexpected_error_keeps_traceback(yaml, monkeypatch):
    def generate(*args, **settings):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(pipeline, "generate", generate)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["generate", "--config", yaml, "--prompt", "a", "--output", "x"])


def test_examples_lists_prints_and_copies_configs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {path.name for path in examples_folder().glob("*.yaml")}
    assert main(["examples"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows} >= names
    assert all(len(row) == 2 for row in rows) and {"prompts.txt", "quickstart.ipynb"} <= {row[0] for row in rows}
    assert ["quickstart.ipynb", "longalign in five minutes"] in rows
    assert dict(rows)["acceptance.sh"].startswith("Loads every published checkpoint")
    assert main(["examples", "mini-align.yaml"]) == 0
    assert capsys.readouterr().out == (examples_folder() / "mini-align.yaml").read_text()
    assert main(["train", "mini-align.yaml"]) == 2
    assert "longalign examples mini-align.yaml --to ." in capsys.readouterr().err
    assert main(["examples", "mini-align.yaml", "--to", "."]) == 0
    assert load_config("mini-align.yaml").encoder.name == "clip-segment"
    Path("mini-align.yaml").write_text("mine: true")
    assert main(["examples", "--to", "."]) == 2
    assert "mini-align.yaml exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mini-align.yaml"]
    assert main(["examples", "--to", "all"]) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} >= names
    assert main(["examples", "mini-alig.yaml"]) == 2
    assert "'mini-align.yaml'" in capsys.readouterr().err


def test_score_and_eval_list_unreadable_images_before_scoring(brightness, tmp_path, capsys):
    folder = images(tmp_path / "images", [0.0, 0.5, 1.0], ["a", "b", "c"])
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    for command in (["score", "--images", str(folder)], ["eval", "--images", f"a={folder}"]):
        assert main([*command, "--reward", brightness]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and "2 images cannot be read" in printed.err
        assert "1.png" in printed.err and "2.png" in printed.err


def test_device_option_reaches_generate_and_fit(yaml, hues, monkeypatch, tmp_path, capsys):
    assert main(["train", yaml, "--device", "cuda:99"]) == 2
    assert re.search(r"got 'cuda:99'.*\bcpu\b", capsys.readouterr().err)
    seen = []
    monkeypatch.setattr(pipeline, "generate", lambda *_, **settings: seen.append(settings["device"]) or [{}])
    assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", "--device", "cpu"]) == 0
    assert seen == ["cpu"] and "1 image in x" in capsys.readouterr().out

    def train(config, runtime, resume):
        seen.append(runtime.device)
        return loop.FitResult(1, tmp_path, False)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    main(["train", yaml])
    assert main(["train", yaml, "--device", "cpu"]) == 0
    assert seen == ["cpu", "mps", "cpu"]


def test_train_parses_overrides_around_options(yaml, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        loop, "train", lambda config, runtime, resume: seen.append(config) or loop.FitResult(1, tmp_path, False)
    )
    assert main(["train", "--device", "cpu", yaml, "loop.steps=9", "--traceback", "loop.lr=0.5"]) == 0
    assert (seen[0].loop.steps, seen[0].loop.lr) == (9, 0.5)


@pytest.mark.parametrize(
    "arguments", [["generate", "--prompt", "a", "--output", "x"], ["score", "--images", "a"], ["nothing"], []]
)
def test_missing_options_print_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: longalign" in capsys.readouterr().err


@pytest.mark.parametrize("signal", [None, 2, 15, 1])
def test_train_passes_overridden_config_to_fit(yaml, monkeypatch, tmp_path, capsys, signal):
    seen = {}

    def train(config, runtime, resume):
        seen.update(config=config, resume=resume)
        return loop.FitResult(3, tmp_path / "checkpoint-000003", signal is not None, signal)

    monkeypatch.setattr(loop, "train", train)
    encoder = "encoder={name: clip-truncate, checkpoint: mini/sd}"
    status = main(["train", yaml, "loop.steps=3", "loop.lr=1e-4", encoder])
    assert status == (128 + signal if signal else 0)
    config = seen["config"]
    assert isinstance(config, RunConfig)
    assert (config.loop.steps, config.loop.lr, config.encoder.name) == (3, 1e-4, "clip-truncate")
    assert seen["resume"] is None
    out = capsys.readouterr().out
    assert "step 3 of 3: " in out
    next_command = f"longalign generate --checkpoint {tmp_path}/checkpoint-000003 "
    assert (next_command in out) == (signal is None)
    main(["train", yaml, f"output={tmp_path / 'out'}", "--resume"])
    assert seen["resume"] == tmp_path / "out"


def test_generate_passes_prompts_and_settings_to_pipeline(yaml, monkeypatch, tmp_path, capsys):
    seen = {}

    def generate(source, prompts, output, **settings):
        seen.update(source=source, prompts=prompts, output=output, **settings)
        return [{}] * len(prompts)

    monkeypatch.setattr(pipeline, "generate", generate)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--seed", "3", "4", "--size", "96x64", "--guidance", "2"]
    assert main(["generate", "--config", yaml, *options, "--output", "here", "--solver", "ddim"]) == 0
    assert seen["source"] == load_config(yaml)
    assert (seen["prompts"], seen["seeds"], seen["output"]) == (["one", "two"], [3, 4], "here")
    assert (seen["width"], seen["height"], seen["guidance"], seen["solver"]) == (96, 64, 2.0, "ddim")
    assert "2 images in here" in capsys.readouterr().out
    assert main(["generate", "--config", yaml, "--prompt", "a", "--prompt", "b", "--output", "x"]) == 0
    assert seen["prompts"] == ["a", "b"]
    assert (seen["height"], seen["width"], seen["dtype"], list(seen["seeds"])) == (None, None, None, [0])
    for name in SOLVERS:
        settings = ["--solver", name, "--dtype", "float16"]
        assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", *settings]) == 0
        assert (seen["solver"], seen["dtype"]) == (name, "float16")
    with pytest.raises(SystemExit):
        main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", "--solver", "euler"])


def test_generate_reads_prompt_sets(yaml, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(pipeline, "generate", lambda source, prompts, *_, **settings: seen.extend(prompts) or prompts)
    rows = [{"type": "color", "short_description": "short", "long_description": "long"}]
    (tmp_path / "color.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (str(tmp_path), f"tiif:{tmp_path / 'color.jsonl'}"):
        assert main(["generate", "--config", yaml, "--prompts", source, "--output", "x"]) == 0
    assert seen == ["short", "long"] * 2
    assert main(["generate", "--config", yaml, "--prompts", f"geneval:{tmp_path}", "--output", "x"]) == 2
    assert re.search("tag, include, prompt .*type, short_description, long_description", capsys.readouterr().err)


def test_generate_suggests_overwrite_before_sampling(yaml, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipeline, "generate", lambda *_, **settings: [settings["overwrite"]])
    existing = images(tmp_path / "existing", [0.5], ["a"])
    command = ["generate", "--config", yaml, "--prompt", "a", "--output", str(existing)]
    assert main(command) == 2
    assert "1 image;" in (err := capsys.readouterr().err) and "--overwrite" in err
    assert main([*command, "--overwrite"]) == 0


def test_generate_help_lists_all_solvers(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in SOLVERS)


@pytest.mark.parametrize("size", ["0", "axb", "64x", "x64", "64x64x64"])
def test_size_option_rejects_invalid_values(size, yaml):
    with pytest.raises(SystemExit):
        main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", "--size", size])


@pytest.mark.parametrize("size", ["63", "64x63"])
def test_generate_reports_size_once(size, yaml, tmp_path, capsys):
    assert main(["generate", "--config", yaml, "--prompt", "a", "--output", str(tmp_path / "x"), "--size", size]) == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if f"got {size}" in line]
    assert [line.split(":")[0] for line in lines] == ["--size"]


def test_score_reads_prompts_from_metadata_or_options(brightness, tmp_path, capsys):
    captioned = images(tmp_path / "captioned", [0.0, 1.0], ["a", "b"])
    assert main(["score", "--reward", brightness, "--images", str(captioned)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["brightness", "0.0000", "1.0000", "0.5000"]
    uncaptioned = images(tmp_path / "uncaptioned", [1.0])
    assert main(["score", "--reward", brightness, "--images", str(uncaptioned)]) == 2
    assert "--prompt or --prompts" in capsys.readouterr().err
    image = str(uncaptioned / "0.png")
    arguments = ["--reward", brightness, "--reward", brightness, "--images", image, "--prompt", "a"]
    assert main(["score", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t")[:2] == ["brightness", "brightness-2"]


def test_eval_compares_folders_with_same_prompts(brightness, tmp_path, capsys):
    base = images(tmp_path / "base", [0.0, 0.2], ["a", "b"], [1, 2])
    tuned = images(tmp_path / "tuned", [0.2, 0.4], ["a", "b"], [1, 2])
    out = tmp_path / "table.json"
    models = [f"base={base}", f"tuned={tuned}"]
    files = ["--json", str(out), "--markdown", str(tmp_path / "table.md"), "--csv", str(tmp_path / "table.csv")]
    assert main(["eval", "--images", *models, "--reward", brightness, "--metric", "gauges", *files]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [(row["model"], row["prompt"], row["seed"]) for row in rows][1:3] == [
        ("base", "b", "2"),
        ("tuned", "a", "1"),
    ]
    assert float(rows[3]["brightness"]) == pytest.approx(0.4, abs=0.01) and float(rows[0]["gauges.dark"]) == 1
    assert json.loads(out.read_text())["configs"] == {"base": None, "tuned": None}
    assert "| tuned - base |" in (tmp_path / "table.md").read_text()
    assert "tuned - base" in capsys.readouterr().out
    table = json.loads(out.read_text())
    assert table["values"]["tuned"]["brightness"] == pytest.approx([0.2, 0.4], abs=0.01)
    assert table["seeds"] == [1, 2]
    other = images(tmp_path / "other", [0.2, 0.4], ["a", "c"], [1, 2])
    assert main(["eval", "--images", models[0], f"other={other}", "--reward", brightness]) == 2
    message = (
        "the prompts and seeds of 'other' differ from 'base': 1 missing and 1 more of 2 images, e.g. 'b' with seed 2"
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "--images expects NAME=DIR, e.g. base=base, got 'base'"),
        (["a=base", "a=other"], "two models are called 'a'; give each a different name, as NAME=other"),
        (["a=base", "b=reversed"], "order"),
        (["a=empty"], r'a list of images with a line \{"file_name"'),
        (["a=base", "--metric", "gauges"], "two metrics are called gauges; give one of them a label"),
        (["a=base", "--metric", "{name: gauges"], "'{name: gauges', line 1: expected ',' or '}'"),
        (["a=base", "--json", "empty"], "--json empty is a folder; give a file"),
        (
            ["a=single", "--metric", "{name: facts, data: {name: scenes, size: 4}}"],
            r"no facts for 1 prompts, e\.g\. 'ü'",
        ),
    ],
)
def test_eval_errors_say_what_to_do(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "base", [0.0, 0.2], ["a", "b"], [1, 2])
    images(tmp_path / "reversed", [0.0, 0.2], ["b", "a"], [2, 1])
    images(tmp_path / "single", [0.0], ["ü"])
    (tmp_path / "empty").mkdir()
    assert main(["eval", "--metric", "gauges", "--images", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_eval_labels_images_by_their_prompt_set(brightness, tmp_path, capsys):
    folder = images(tmp_path / "base", [0.0, 0.2], ["a  b", "b"], [1, 2])
    prompts, plain, other = (tmp_path / name for name in ("set.jsonl", "plain.txt", "other.jsonl"))
    rows = [{"prompt": p, "labels": {"topic": topic}} for p, topic in (("b", "cats"), ("c", "dogs"), ("a b", ["dogs"]))]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    plain.write_text("a b\nb\n")
    other.write_text(json.dumps(rows[0]))
    command = ["eval", "--images", f"base={folder}", "--reward", brightness, "--json", str(tmp_path / "t.json")]
    assert main([*command, "--prompts", str(prompts)]) == 0
    out = capsys.readouterr().out
    assert "brightness by topic of the prompt" in out and re.search(r"cats +0\.2000.*\ndogs +0\.0000", out)
    assert json.loads((tmp_path / "t.json").read_text())["labels"] == {"topic": [["dogs"], ["cats"]]}
    assert main([*command, "--prompts", str(plain)]) == 2
    assert re.search(r"--prompts adds labels .*plain\.txt has none; remove --prompts", capsys.readouterr().err)
    assert main([*command, "--prompts", str(other)]) == 2
    assert re.search(r"1 of 2 prompts are not among the 1 of plain, e\.g\. 'a  b'", capsys.readouterr().err)


class Hues(EmbeddingReward):
    """A reward that embeds texts by their length and images by their mean colour."""

    dim = 3

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)) + 0.1, dim=-1)

    def text_features(self, prompts):
        return torch.nn.functional.normalize(torch.tensor([[1.0, len(p), 0.0] for p in prompts]), dim=-1)


class HuesConfig(RewardConfig):
    name: str = "hues"

    def build(self, runtime):
        return Hues()


@pytest.fixture
def hues():
    rewards.register("hues", HuesConfig)
    yield ["--reward", "hues"]
    rewards.unregister("hues")


@pytest.fixture
def generate_calls(monkeypatch):
    """Settings of all generation calls; the fake model generates grey images."""
    calls = []

    def generate(source, prompts, output, seeds, **settings):
        calls.append({"source": source, "prompts": prompts, "seeds": seeds, **settings})
        rows = [(prompt, seed) for prompt in prompts for seed in seeds]
        images(Path(output), [0.5] * len(rows), *zip(*rows, strict=True))
        return rows

    monkeypatch.setattr(pipeline, "generate", generate)
    return calls


@pytest.fixture
def run(tmp_path):
    """Folder of a run with one checkpoint."""
    path = tmp_path / "run" / "checkpoint-000001" / "longalign.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    return str(tmp_path / "run")


def test_eval_with_two_embedding_rewards_generates_missing_images(hues, generate_calls, run, tmp_path, capsys):
    base = images(tmp_path / "base", [0.0, 0.2, 0.4, 0.6], ["a", "a", "bb", "bb"], [1, 2, 1, 2])
    settings = ["--prompt", "a", "--prompt", "bb", "--seed", "1", "2", "--dtype", "bfloat16"]
    models = ["--images", f"base={base}", "--checkpoint", f"ours={run}", "--output", str(tmp_path / "out")]
    assert main(["eval", *models, *settings, *hues, *hues, "--json", str(tmp_path / "t.json")]) == 0
    calls = [(call["prompts"], call["seeds"], call["dtype"]) for call in generate_calls]
    assert calls == [(["a", "bb"], [1, 2], "bfloat16")]
    assert "ours - base" in capsys.readouterr().out
    table = json.loads((tmp_path / "t.json").read_text())
    names = ["hues", "hues.text_relevant", "hues.text_irrelevant", "hues-o"]
    names += ["hues-2", "hues-2.text_relevant", "hues-2.text_irrelevant", "hues-2-o"]
    assert list(table["values"]["ours"]) == names and table["seeds"] == [1, 2, 1, 2]
    assert table["values"]["ours"]["hues"] == table["values"]["ours"]["hues-2"]


def test_eval_rejects_invalid_input_before_generating(hues, generate_calls, run, tmp_path, capsys):
    def message(*arguments):
        out = ["--checkpoint", f"ours={run}", "--output", str(tmp_path / "out")]
        assert main(["eval", *out, *hues, "--prompt", "a", *arguments]) == 2 and not generate_calls
        return capsys.readouterr().err

    duplicate = ["--metric", "{name: reward, reward: hues, label: hues}"]
    assert re.search(r"two metrics .* hues;.*label", message(*duplicate))
    assert "--json" in message("--prompt", "b", "--json", str(tmp_path / "none" / "t.json"))
    assert "no checkpoint in nowhere" in message("--prompt", "b", "--checkpoint", "other=nowhere")
    other = images(tmp_path / "other", [0.5], ["a"], [3])
    assert re.search("prompts and seeds.*'other'.*'ours'", message("--images", f"other={other}"))
    (other / "0.png").unlink()
    assert re.search(r"0\.png .*metadata\.jsonl, line 1 does not exist", message("--images", f"other={other}"))
    existing = images(tmp_path / "out" / "ours", [0.5], ["a"])
    assert f"give --images ours={existing}, not --checkpoint" in message("--prompt", "b")
    command = ["score", "--checkpoint", run, *hues, "--prompt", "a", "--output", str(existing)]
    assert main(command) == 2 and not generate_calls
    assert "1 image; choose an empty folder" in capsys.readouterr().err


def test_revision_and_variant_only_apply_to_pipelines(hues, generate_calls, run, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(baselines, "generate", lambda *_, **settings: seen.append(settings) or [])
    options = ["--prompt", "a", "--output", str(tmp_path / "out"), "--variant", "fp16", "--revision", "main"]
    assert main(["generate", "--pipeline", "owner/name", *options]) == 0
    assert (seen[0]["variant"], seen[0]["revision"]) == ("fp16", "main")
    for command in (["generate", "--checkpoint", run], ["score", "--checkpoint", run, *hues],
                    ["eval", "--checkpoint", f"ours={run}", *hues]):  # fmt: skip
        assert main([*command, *options]) == 2 and not generate_calls
        assert re.search("--revision .*--pipeline", capsys.readouterr().err)


def test_guidance_interval_applies_to_checkpoints_only(generate_calls, run, tmp_path, capsys):
    options = ["--prompt", "a", "--output", str(tmp_path / "out"), "--guidance-interval", "0.3", "5"]
    assert main(["generate", "--checkpoint", run, *options]) == 0
    assert generate_calls[0]["guidance_interval"] == [0.3, 5.0]
    options[3] = str(tmp_path / "second")
    assert main(["generate", "--pipeline", "owner/name", *options]) == 2
    assert re.search("--guidance-interval .*--pipeline", capsys.readouterr().err)


def test_score_generates_images_of_checkpoint(hues, generate_calls, run, capsys):
    assert main(["score", "--checkpoint", run, *hues, "--prompt", "a", "--seed", "4"]) == 0
    assert generate_calls[0]["source"].name == "checkpoint-000001" and generate_calls[0]["dtype"] is None
    assert capsys.readouterr().out.splitlines()[-1].endswith("mean of 1")


def test_compute_direction_passes_its_source_and_prints_report(monkeypatch, tmp_path, capsys):
    class Report:
        def report(self):
            return "eta 0.9"

    seen = []
    monkeypatch.setattr(compute, "write_direction", lambda *args, **keys: seen.append((*args, keys)) or Report())
    (tmp_path / "corpus.txt").write_text("one\n\ntwo\n")
    out = str(tmp_path / "d.safetensors")
    reward = "{name: clip, checkpoint: mini/clip}"
    command = ["compute-direction", "--reward", reward, "--output", out]
    assert main([*command, "--prompts", str(tmp_path / "corpus.txt")]) == 0
    assert (seen[0][0].name, seen[0][1], seen[0][2]["prompts"]) == ("clip", out, ["one", "two"])
    assert "eta 0.9" in capsys.readouterr().out
    folders = [images(tmp_path / name, [0.0, 1.0], ["a", "b"]) for name in ("x", "y")]
    assert main([*command, "--images", f"reference={folders[0]}", f"over={folders[1]}"]) == 0
    assert seen[1][2]["images"] == (str(folders[1]), str(folders[0]))
    for wrong in (["a=x", f"over={folders[0]}"], [f"over={folders[0]}", f"over={folders[1]}"], ["over=", "reference="]):
        assert main([*command, "--images", *wrong]) == 2
        assert "expected --images over=DIR reference=DIR, got" in capsys.readouterr().err


def test_keyboard_interrupt_exits_with_130(monkeypatch, yaml, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score_images", stop)
    monkeypatch.setattr(loop, "train", stop)
    assert main(["train", yaml]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png"])
def test_score_and_eval_reject_images_outside_folder(brightness, tmp_path, capsys, name):
    images(tmp_path, [1.0]).joinpath("0.png").rename(tmp_path / "secret.png")
    folder = images(tmp_path / "in", [0.0], ["a"])
    row = {"file_name": name.format(tmp_path), "text": "a"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    for command in (["score", "--images", str(folder)], ["eval", "--images", f"a={folder}"]):
        assert main([*command, "--reward", brightness]) == 2
        err = capsys.readouterr().err
        assert "metadata.jsonl, line 1: " in err and f"{row['file_name']!r} " in err
