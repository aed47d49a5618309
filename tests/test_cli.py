"""The command line: what it prints, what it hands on, and how it fails."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest
import torch

from longalign import baselines, cli, evaluate, pipeline
from longalign.backbones.configs import LoraConfig
from longalign.cli import main
from longalign.compose import Composition
from longalign.config import load_config, to_yaml
from longalign.image_io import write_png
from longalign.registry import PartConfig, rewards, trainers
from longalign.rewards import direction
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import examples_folder
from longalign.trainers import loop
from longalign.trainers.configs import AlignConfig

CONFIG = {
    "backbone": {"name": "sd", "checkpoint": "mini/sd"},
    "encoder": {"name": "clip-segment", "checkpoint": "mini/sd"},
    "trainer": "align",
    "data": "scenes",
}
COMMANDS = (
    "train",
    "cache",
    "generate",
    "score",
    "eval",
    "direction",
    "list",
    "describe",
    "convert",
    "export",
    "demo",
    "examples",
    "env",
)


@pytest.fixture
def yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(load_config(CONFIG)))
    return str(path)


def images(folder, values, prompts=None, seeds=None):
    """A folder of one-coloured images, with metadata if there are prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        write_png(folder / f"{i}.png", torch.full((3, 4, 4), value))
    if prompts is not None:
        seeds = seeds or [0] * len(values)
        rows = zip(prompts, seeds, strict=True)
        lines = [json.dumps({"file_name": f"{i}.png", "prompt": p, "seed": s}) for i, (p, s) in enumerate(rows)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_no_torch_where_none_is_needed(yaml):
    light = [
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
from longalign.backbones.configs import LoraConfig
from longalign.cli import main
for arguments in {light!r}:
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
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"  longalign {command}" in text.partition("examples:")[2]
    assert "%%" not in text


def test_python_m_longalign():
    result = subprocess.run([sys.executable, "-m", "longalign", "list", "trainers"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "align" in result.stdout


def test_list_shows_kind_name_owner_and_target(capsys):
    assert main(["list", "encoders", "rewards", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "name", "owner", "target"]
    row = next(line for line in lines if line.startswith("encoders") and " t5 " in line)
    assert row.split()[-1] == "longalign.encoders.configs:T5Config"
    assert not any(line.startswith("trainers") for line in lines)
    assert main(["list", "--check"]) == 0
    capsys.readouterr()
    assert main(["list", "encoders"]) == 0
    out = capsys.readouterr().out
    assert "T5's encoder over the" in out
    assert "longalign.encoders" not in out


def test_list_and_describe_fit_the_terminal(capsys, monkeypatch):
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
def test_describe_takes_the_keys_of_a_config_and_the_names_of_parts(words, shown, capsys):
    assert main(["describe", *words]) == 0
    assert shown in capsys.readouterr().out


def test_describe_shows_the_defaults_of_a_plugin_not_those_of_a_class(capsys):
    class MineConfig(AlignConfig):
        """Mine."""

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


def test_describe_a_part_shows_each_key_with_type_default_and_words(capsys):
    assert main(["describe", "data", "scenes"]) == 0
    text = capsys.readouterr().out
    assert 'style: "plain" | "referring" | "mixed" = "plain"' in text
    assert "words: [int > 0, int > 0] = [20, 250]" in text
    assert "another seed gives other scenes" in text
    main(["describe", "rewards", "reweighted"])
    text = capsys.readouterr().out
    assert "inner: one of rewards (required)" in text
    assert "omega: float >= 0 = 0.3" in text
    main(["describe", "trainers", "align"])
    assert "lora.rank: int >= 1 = 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", ["encoders", "rewards", "trainers", "data", "segmenters", "gradient_steps", "backbones"]
)
def test_every_part_describes_itself_and_every_key(kind, capsys):
    from longalign.registry import REGISTRIES

    for name in REGISTRIES[kind].names():
        assert main(["describe", kind, name]) == 0
        about = REGISTRIES[kind].get(name).__doc__
        assert about
        shown = capsys.readouterr().out
        assert about.split(".")[0].split("``")[0].split("\n")[0] in shown, name
        lines = [*shown.splitlines(), ""]
        for key in REGISTRIES[kind].get(name).model_fields:
            if key != "name":
                at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}: "))
                assert lines[at + 1].startswith("    "), f"'{key}' of {name} is not described"


def test_describe_hides_the_credentials_of_addresses(yaml, capsys):
    data = "data={name: hf, dataset: parquet, files: ['https://me:secret@host/a.parquet?token=secret']}"
    assert main(["describe", yaml, data]) == 0
    shown = capsys.readouterr().out
    assert "https://***@host/a.parquet?token=***" in shown
    assert "secret" not in shown


def test_no_error_shows_the_credentials_of_addresses(monkeypatch, yaml, capsys):
    def fit(composition, resume=None):
        raise OSError("nothing at https://me:secret@host/a.parquet")

    monkeypatch.setattr(loop, "fit", fit)
    assert main(["train", yaml, "encoder.checkpoint=mini/sd"]) == 2
    assert "nothing at https://***@host/a.parquet" in capsys.readouterr().err


def test_describe_a_config_shows_it_whole_and_changed(yaml, capsys, tmp_path):
    assert main(["describe", yaml, "trainer.lora.rank=4"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "shown.yaml")
    assert config.trainer.lora.rank == 4
    assert config.loop == load_config(CONFIG).loop


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "encodder"], "cannot describe 'encodder'; did you mean 'encoders'?"),
        (["describe", "encoders", "clip-segmen"], "did you mean 'clip-segment'?"),
        (["describe", "encoders", "t5", "longclip"], "expected a kind and one part's name, or one word"),
        (["list", "reward"], "no kind 'reward'; did you mean 'rewards'?"),
        (["train", "nowhere.yaml"], "no config file nowhere.yaml"),
        (
            ["generate", "--config", "YAML", "--prompt", "a", "--output", "YAML"],
            "run.yaml is a file; expected a folder",
        ),
        (
            ["generate", "--config", "YAML", "--prompt", "a", "--output", "YAML/x"],
            "run.yaml is a file; expected a folder",
        ),
        (
            ["generate", "--config", "YAML", "--prompt", "a", "--output", "x", "--seed", "3", "3"],
            "expected different seeds, got 3 more than once",
        ),
        (["train", "YAML", "steps"], "expected path=value"),
        (["train", "YAML", "loop.stepz=3"], "loop.stepz: this key does not exist; did you mean 'steps'?"),
        (["train", "YAML", "--resume-from", "nowhere"], "no checkpoint in nowhere"),
        (["score", "--reward", "clip", "--images", "nowhere.png"], "no image nowhere.png"),
        (["score", "--reward", "{name: clip, chekpoint: x}", "--images", "a.png"], "did you mean 'checkpoint'?"),
        (["eval", "--reward", "clip", "--images", "folder"], "--images takes NAME=... with a name"),
        (["score", "--reward", "clip", "--images", "a.png", "--seed", "1"], "--seed only applies when generating"),
        (["eval", "--reward", "clip", "--images", "a=b", "--dtype", "float16"], "--dtype only applies when generating"),
        (["direction", "--reward", "clip", "--prompts", "a.csv", "--output", "x"], "a .txt or a .jsonl file"),
        (["generate", "--checkpoint", "nowhere", "--prompt", "a", "--output", "x"], "no checkpoint in nowhere"),
    ],
)
def test_mistakes_are_told_in_one_message_without_traceback(arguments, message, yaml, capsys):
    assert main([a.replace("YAML", yaml) for a in arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith(f"longalign {arguments[0]}: ")
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "arguments", [["--traceback", "train", "nowhere.yaml"], ["train", "nowhere.yaml", "--traceback"]]
)
def test_traceback_on_demand(arguments):
    with pytest.raises(FileNotFoundError):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "run.yaml"], "no command 'trian'; did you mean 'train'?"),
        ([], "expected a command: train, "),
        (["train"], "required: config\n"),
        (
            ["train", "run.yaml", "--lr", "1e-4"],
            "no option --lr; keys of the config are set as path=value",
        ),
        (["train", "run.yaml", "--loop.lr=1e-4"], "here loop.lr=..."),
        (["train", "run.yaml", "--resme"], "no option --resme; did you mean '--resume'?"),
        (["generate", "--promts", "a.txt"], "no option --promts; did you mean '--prompts'?"),
        (["generate", "--seed", "-1"], "expected a whole number from 0 to 2^64 - 1, got '-1'"),
        (["generate", "--seed", str(2**64)], "expected a whole number from 0"),
        (["generate", "--guidance", "nan"], "expected a number, got 'nan'"),
        (["train", "run.yaml", "--device", "gpu"], "expected cpu, cuda, cuda:1 or mps, got 'gpu'"),
    ],
)
def test_misspelt_calls_say_what_was_expected(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"longalign {version('longalign')}\n"


def test_processes_wait_for_the_first_one_to_report_what_all_have(monkeypatch, capsys):
    events = []
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: events.append(capsys.readouterr().err))
    for rank, waits in (("0", 0), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", "nowhere.yaml"]) == 2
        assert events == [""] * waits  # nothing was said before
        assert capsys.readouterr().err.count("no config file") == 1


def test_no_memory_says_what_to_lower(yaml, monkeypatch, capsys):
    def generate(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")

    monkeypatch.setattr(pipeline, "generate", generate)
    assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x"]) == 2
    told = capsys.readouterr().err
    assert "Tried to allocate 2 GiB" in told and "--batch below 8" in told and "--dtype bfloat16" in told
    assert "Details" not in told


def test_a_package_that_is_not_installed_is_named(yaml, monkeypatch, capsys):
    def generate(*args, **settings):
        import no_such_package.inside  # noqa: F401  # type: ignore[import-not-found]

    monkeypatch.setattr(pipeline, "generate", generate)
    assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x"]) == 2
    assert "needs the package 'no_such_package'" in capsys.readouterr().err


def test_an_error_that_is_a_bug_keeps_its_traceback(yaml, monkeypatch):
    def generate(*args, **settings):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(pipeline, "generate", generate)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["generate", "--config", yaml, "--prompt", "a", "--output", "x"])


def test_examples_are_listed_printed_and_copied(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {path.name for path in examples_folder().glob("*.yaml")}
    assert main(["examples"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows} >= names
    assert all(len(row) == 2 for row in rows) and {"prompts.txt", "ablate_encoder.py"} <= {row[0] for row in rows}
    assert main(["examples", "mini-align.yaml"]) == 0
    assert capsys.readouterr().out == (examples_folder() / "mini-align.yaml").read_text()
    assert main(["train", "mini-align.yaml"]) == 2
    assert "bundled: longalign examples mini-align.yaml --to ." in capsys.readouterr().err
    assert main(["examples", "mini-align.yaml", "--to", "."]) == 0
    assert load_config("mini-align.yaml").encoder.name == "clip-segment"
    Path("mini-align.yaml").write_text("mine: true")
    assert main(["examples", "--to", "."]) == 2
    assert "mini-align.yaml exists and differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mini-align.yaml"]
    assert main(["examples", "--to", "all"]) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} >= names
    assert main(["examples", "mini-alig.yaml"]) == 2
    assert "did you mean 'mini-align.yaml'?" in capsys.readouterr().err


def test_env_says_versions_devices_and_settings_without_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if not line.startswith("plugin"))
    assert rows["torch"] == torch.__version__ and rows["longalign"] == version("longalign")
    assert "threads" in rows["cpu"] and rows["HF_HUB_OFFLINE"] == "1"
    assert "secret" not in text


def test_unreadable_images_are_all_named_before_any_is_scored(brightness, tmp_path, capsys):
    folder = images(tmp_path / "images", [0.0, 0.5, 1.0], ["a", "b", "c"])
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    for command in (["score", "--images", str(folder)], ["eval", "--images", f"a={folder}"]):
        assert main([*command, "--reward", brightness]) == 2
        told = capsys.readouterr()
        assert told.out == "" and "2 images cannot be read" in told.err
        assert "1.png" in told.err and "2.png" in told.err


def test_the_device_is_handed_on(yaml, hues, monkeypatch, tmp_path, capsys):
    assert main(["train", yaml, "--device", "cuda:99"]) == 2
    assert "expected an available device, got 'cuda:99'; available: cpu" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(pipeline, "generate", lambda *_, **settings: seen.append(settings["device"]) or [{}])
    assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", "--device", "cpu"]) == 0
    assert seen == ["cpu"] and "1 image in x" in capsys.readouterr().out

    def fit(composition, resume=None):
        seen.append(composition.runtime.device)
        return loop.FitResult(1, tmp_path, False)

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    main(["train", yaml])
    assert main(["train", yaml, "--device", "cpu"]) == 0
    assert seen == ["cpu", "mps", "cpu"]


def test_overrides_stand_before_and_after_options(yaml, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        loop, "fit", lambda run, resume=None: seen.append(run.config) or loop.FitResult(1, tmp_path, False)
    )
    assert main(["train", "--device", "cpu", yaml, "loop.steps=9", "--traceback", "loop.lr=0.5"]) == 0
    assert (seen[0].loop.steps, seen[0].loop.lr) == (9, 0.5)


@pytest.mark.parametrize(
    "arguments", [["generate", "--prompt", "a", "--output", "x"], ["score", "--images", "a"], ["nothing"], []]
)
def test_missing_options_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: longalign" in capsys.readouterr().err


@pytest.mark.parametrize("signal", [None, 2, 15, 1])
def test_train_hands_the_changed_config_to_the_loop(yaml, monkeypatch, tmp_path, capsys, signal):
    seen = {}

    def fit(composition, resume=None):
        seen.update(composition=composition, resume=resume)
        return loop.FitResult(3, tmp_path / "checkpoint-000003", signal is not None, signal)

    monkeypatch.setattr(loop, "fit", fit)
    encoder = "encoder={name: clip-truncate, checkpoint: mini/sd}"
    status = main(["train", yaml, "loop.steps=3", "loop.lr=1e-4", encoder])
    assert status == (128 + signal if signal else 0)
    assert isinstance(seen["composition"], Composition)
    config = seen["composition"].config
    assert (config.loop.steps, config.loop.lr, config.encoder.name) == (3, 1e-4, "clip-truncate")
    assert seen["resume"] is None
    told = capsys.readouterr().out
    assert "step 3 of 3: " in told
    generate = f"next: longalign generate --checkpoint {tmp_path}/checkpoint-000003 "
    assert (generate in told) == (signal is None)
    main(["train", yaml, f"output={tmp_path / 'out'}", "--resume"])
    assert seen["resume"] == tmp_path / "out"


def test_generate_hands_prompts_and_settings_on(yaml, monkeypatch, tmp_path, capsys):
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
    for name in pipeline.SOLVERS:
        more = ["--solver", name, "--dtype", "float16"]
        assert main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", *more]) == 0
        assert (seen["solver"], seen["dtype"]) == (name, "float16")
    with pytest.raises(SystemExit):
        main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", "--solver", "euler"])


def test_generate_says_early_how_images_are_replaced(yaml, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipeline, "generate", lambda *_, **settings: [settings["overwrite"]])
    there = images(tmp_path / "there", [0.5], ["a"])
    command = ["generate", "--config", yaml, "--prompt", "a", "--output", str(there)]
    assert main(command) == 2
    assert "lists 1 image;" in (told := capsys.readouterr().err) and "--overwrite" in told
    assert main([*command, "--overwrite"]) == 0


def test_the_schedulers_named_in_help_are_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in pipeline.SOLVERS)


@pytest.mark.parametrize("size", ["0", "axb", "64x", "x64", "64x64x64"])
def test_sizes_that_are_none(size, yaml):
    with pytest.raises(SystemExit):
        main(["generate", "--config", yaml, "--prompt", "a", "--output", "x", "--size", size])


def test_score_reads_prompts_beside_the_images_or_takes_them(brightness, tmp_path, capsys):
    told = images(tmp_path / "told", [0.0, 1.0], ["a", "b"])
    assert main(["score", "--reward", brightness, "--images", str(told)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["brightness", "0.0000", "1.0000", "0.5000"]
    bare = images(tmp_path / "bare", [1.0])
    assert main(["score", "--reward", brightness, "--images", str(bare)]) == 2
    assert "come without prompts" in capsys.readouterr().err
    arguments = ["--reward", brightness, "--reward", brightness, "--images", str(bare / "0.png"), "--prompt", "a"]
    assert main(["score", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t")[:2] == ["brightness", "brightness-2"]


def test_eval_compares_folders_of_the_same_prompts(brightness, tmp_path, capsys):
    base = images(tmp_path / "base", [0.0, 0.2], ["a", "b"], [1, 2])
    tuned = images(tmp_path / "tuned", [0.2, 0.4], ["a", "b"], [1, 2])
    out = tmp_path / "table.json"
    pair = [f"base={base}", f"tuned={tuned}"]
    files = ["--json", str(out), "--markdown", str(tmp_path / "table.md")]
    assert main(["eval", "--images", *pair, "--reward", brightness, *files]) == 0
    assert json.loads(out.read_text())["configs"] == {"base": None, "tuned": None}
    assert "| tuned - base |" in (tmp_path / "table.md").read_text()
    assert "tuned - base" in capsys.readouterr().out
    table = json.loads(out.read_text())
    assert table["values"]["tuned"]["brightness"] == pytest.approx([0.2, 0.4], abs=0.01)
    assert table["seeds"] == [1, 2]
    other = images(tmp_path / "other", [0.2, 0.4], ["a", "c"], [1, 2])
    assert main(["eval", "--images", pair[0], f"other={other}", "--reward", brightness]) == 2
    assert "'other' are not of the same prompts and seeds as those of 'base'" in capsys.readouterr().err


class Hues(EmbeddingReward):
    """A text points as its length says; an image along its mean colour."""

    dim = 3

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)) + 0.1, dim=-1)

    def text_features(self, prompts):
        return torch.nn.functional.normalize(torch.tensor([[1.0, len(p), 0.0] for p in prompts]), dim=-1)


class HuesConfig(PartConfig):
    name: str = "hues"

    def build(self, runtime):
        return Hues()


@pytest.fixture
def hues():
    rewards.register("hues", HuesConfig)
    yield ["--reward", "hues"]
    rewards.unregister("hues")


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn, by a model whose images are grey."""
    calls = []

    def generate(source, prompts, output, seeds, **settings):
        calls.append({"source": source, "prompts": prompts, "seeds": seeds, **settings})
        told = [(prompt, seed) for prompt in prompts for seed in seeds]
        images(Path(output), [0.5] * len(told), *zip(*told, strict=True))
        return told

    monkeypatch.setattr(pipeline, "generate", generate)
    return calls


@pytest.fixture
def run(tmp_path):
    """A run's folder with a checkpoint in it."""
    path = tmp_path / "run" / "checkpoint-000001" / "longalign.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    return str(tmp_path / "run")


def test_eval_takes_several_embedding_rewards_and_draws_what_is_not_there(hues, drawn, run, tmp_path, capsys):
    base = images(tmp_path / "base", [0.0, 0.2, 0.4, 0.6], ["a", "a", "bb", "bb"], [1, 2, 1, 2])
    told = ["--prompt", "a", "--prompt", "bb", "--seed", "1", "2", "--dtype", "bfloat16"]
    models = ["--images", f"base={base}", "--checkpoint", f"ours={run}", "--output", str(tmp_path / "out")]
    assert main(["eval", *models, *told, *hues, *hues, "--json", str(tmp_path / "t.json")]) == 0
    assert [(call["prompts"], call["seeds"], call["dtype"]) for call in drawn] == [(["a", "bb"], [1, 2], "bfloat16")]
    assert "ours - base" in capsys.readouterr().out
    table = json.loads((tmp_path / "t.json").read_text())
    first = ["hues", "hues.text_relevant", "hues.text_irrelevant", "hues-o"]
    second = ["hues-2", "hues-2.text_relevant", "hues-2.text_irrelevant", "hues-2-o"]
    assert list(table["values"]["ours"]) == [*first, *second] and table["seeds"] == [1, 2, 1, 2]
    assert table["values"]["ours"]["hues"] == table["values"]["ours"]["hues-2"]


def test_eval_finds_out_what_is_wrong_before_it_draws(hues, drawn, run, tmp_path, capsys):
    def told(*arguments):
        out = ["--checkpoint", f"ours={run}", "--output", str(tmp_path / "out")]
        assert main(["eval", *out, *hues, "--prompt", "a", *arguments]) == 2 and not drawn
        return capsys.readouterr().err

    assert "at least two different prompts, got 1; add prompts" in told()
    assert "no folder for --json" in told("--prompt", "b", "--json", str(tmp_path / "none" / "t.json"))
    assert "no checkpoint in nowhere" in told("--prompt", "b", "--checkpoint", "other=nowhere")
    other = images(tmp_path / "other", [0.5], ["a"], [3])
    assert "'other' are not of the same prompts and seeds as those of 'ours'" in told("--images", f"other={other}")
    (other / "0.png").unlink()
    assert "0.png, which" in told("--images", f"other={other}")
    there = images(tmp_path / "out" / "ours", [0.5], ["a"])
    assert f"to compare with these, give --images ours={there}, not --checkpoint" in told("--prompt", "b")
    assert main(["score", "--checkpoint", run, *hues, "--prompt", "a", "--output", str(there)]) == 2 and not drawn
    assert "lists 1 image; choose an empty folder" in capsys.readouterr().err


def test_revision_and_variant_are_of_stock_pipelines(hues, drawn, run, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(baselines, "generate", lambda *_, **settings: seen.append(settings) or [])
    told = ["--prompt", "a", "--output", str(tmp_path / "out"), "--variant", "fp16", "--revision", "main"]
    assert main(["generate", "--pipeline", "owner/name", *told]) == 0
    assert (seen[0]["variant"], seen[0]["revision"]) == ("fp16", "main")
    for command in (["generate", "--checkpoint", run], ["score", "--checkpoint", run, *hues],
                    ["eval", "--checkpoint", f"ours={run}", *hues]):  # fmt: skip
        assert main([*command, *told]) == 2 and not drawn
        assert "--revision only applies to --pipeline" in capsys.readouterr().err


def test_score_draws_first(hues, drawn, run, capsys):
    assert main(["score", "--checkpoint", run, *hues, "--prompt", "a", "--seed", "4"]) == 0
    assert drawn[0]["source"].name == "checkpoint-000001" and drawn[0]["dtype"] is None
    assert capsys.readouterr().out.splitlines()[-1].endswith("mean of 1")


def test_direction_hands_the_corpus_on_and_prints_the_report(monkeypatch, tmp_path, capsys):
    class Report:
        def report(self):
            return "eta 0.9"

    seen = []
    monkeypatch.setattr(direction, "write_direction", lambda *args: seen.append(args) or Report())
    (tmp_path / "corpus.txt").write_text("one\n\ntwo\n")
    out = str(tmp_path / "d.safetensors")
    reward = "{name: clip, checkpoint: mini/clip}"
    assert main(["direction", "--reward", reward, "--prompts", str(tmp_path / "corpus.txt"), "--output", out]) == 0
    assert seen[0][0].name == "clip"
    assert seen[0][1:3] == (["one", "two"], out)
    assert "eta 0.9" in capsys.readouterr().out


def test_ctrl_c_and_a_closed_pipe_are_no_tracebacks(monkeypatch, yaml, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "score_images", stop)
    monkeypatch.setattr(loop, "fit", stop)
    assert main(["train", yaml]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png"])
def test_scored_folders_name_no_image_elsewhere(brightness, tmp_path, capsys, name):
    images(tmp_path, [1.0]).joinpath("0.png").rename(tmp_path / "secret.png")
    folder = images(tmp_path / "in", [0.0], ["a"])
    row = {"file_name": name.format(tmp_path), "text": "a"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    for command in (["score", "--images", str(folder)], ["eval", "--images", f"a={folder}"]):
        assert main([*command, "--reward", brightness]) == 2
        assert "leads out of" in capsys.readouterr().err
