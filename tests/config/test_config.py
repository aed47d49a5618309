"""Run configs: loading, validation, overrides, comparison."""

import json
import re
import struct
import time
from pathlib import Path

import pytest
import yaml

from longalign.config.changes import diff, override, parse_assignments
from longalign.config.parsing import parse_value
from longalign.config.run import RunConfig, load_config, to_dict, to_json, to_yaml
from longalign.config.sections import LoopConfig
from longalign.errors import ConfigError, redact_url, shorten
from longalign.files.paths import checkpoint_file
from longalign.registry import encoders

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.y*ml"))

ALIGN = {
    "backbone": {"name": "sd", "checkpoint": "mini/sd"},
    "encoder": {"name": "clip-segment", "checkpoint": "mini/sd"},
    "trainer": "align",
    "data": "scenes",
}
REWARD = {
    **ALIGN,
    "encoder": {"name": "concat", "parts": [{"name": "clip-segment", "checkpoint": "mini/sd"}, "t5"]},
    "rewards": [{"name": "reweighted", "inner": {"name": "denscore", "checkpoint": "x"}}, "hpsv2"],
    "trainer": {"name": "reward", "gradient_steps": {"name": "last", "k": 2}},
    "data": {"name": "prompts", "file": "prompts.txt"},
    "monitor": {"prompts": ["a", "b"]},
    "loop": {"trackers": ["tensorboard"], "ema": 0.99},
}


def problems(source):
    with pytest.raises(ConfigError) as error:
        load_config(source)
    return dict(error.value.errors)


def write_checkpoint(folder, metadata):
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"__metadata__": metadata}).encode()
    (folder / "longalign.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


@pytest.mark.parametrize("source", [ALIGN, REWARD], ids=["align", "reward"])
def test_config_round_trips_through_all_formats(source, tmp_path):
    config = load_config(source)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "run.json").write_text(to_json(config))
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoint-000100", {"config": to_json(config)})
    files = (tmp_path / "run.yaml", tmp_path / "run.json", checkpoint, tmp_path / "run")
    for copy in (config, to_dict(config), *files):
        assert load_config(copy) == config
        assert to_dict(load_config(copy)) == to_dict(config)
    assert load_config(str(checkpoint / "longalign.safetensors")) == config


def test_to_dict_contains_nested_defaults():
    tree = to_dict(load_config(REWARD))
    assert tree["rewards"][0]["omega"] == 0.3
    assert tree["rewards"][0]["inner"]["text"] == "segments"
    assert tree["encoder"]["parts"][0]["segmenter"]["name"] == "sentence"
    assert tree["trainer"]["lora"]["rank"] == 32
    assert tree["trainer"]["gradient_steps"] == {"name": "last", "k": 2, "detach": True}
    assert tree["loop"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_config_round_trips_through_yaml(path):
    config = load_config(path)
    assert load_config(yaml.safe_load(to_yaml(config))) == config


def test_load_config_reports_all_problems_with_paths():
    source = {
        **REWARD,
        "encoder": {"name": "concat", "parts": [{"name": "clip-segment", "modle": 1}, {"name": "t6"}]},
        "rewards": [{"name": "reweighted", "omega": "much", "inner": {"name": "denscore", "chekpoint": "x"}}],
        "loop": {"step": 5, "batch_size": 0, "betas": [0.9, 1.5]},
        "trianer": "align",
        "seed": -1,
    }
    messages = problems(source)
    assert "available: name, checkpoint, " in messages["encoder.parts.0.modle"]
    assert "'t5'" in messages["encoder.parts.1.name"]
    assert "'checkpoint'" in messages["rewards.0.inner.chekpoint"]
    assert "got 'much'" in messages["rewards.0.omega"]
    assert "'steps'" in messages["loop.step"]
    assert messages["loop.batch_size"].endswith("got 0")
    assert messages["loop.betas.1"].endswith("got 1.5")
    assert "'trainer'" in messages["trianer"]
    assert messages["seed"].endswith("got -1")
    assert len(messages) == 9


@pytest.mark.parametrize(
    ("keys", "path", "message"),
    [
        ({"monitor": {"prompts": 3}}, "monitor.prompts", "list.*text, got 3$"),
        ({"loop": 3}, "loop", "mapping, got 3$"),
        ({"loop": {"steps": 1.5}}, "loop.steps", r"integer, got 1\.5$"),
        ({"loop": {"trackers": "wandbb"}}, "loop.trackers.0", "got 'wandbb'.*'wandb'"),
        ({"loop": {"steps": True}}, "loop.steps", "integer, got True$"),
        ({"loop": {"steps": "5"}}, "loop.steps", "integer, got '5'$"),
        ({"loop": {"steps": 5.0}}, "loop.steps", r"integer, got 5\.0$"),
        ({"loop": {"steps": 10**30}}, "loop.steps", f"got {10**30}$"),
        ({"loop": {"batch_size": 10**12}}, "loop.batch_size", f" 1000000, got {10**12}$"),
        ({"loop": {"lr": "fast"}}, "loop.lr", "number, got 'fast'$"),
        ({"loop": {"lr": True}}, "loop.lr", "number, got True$"),
        ({"loop": {"gradient_checkpointing": "yes"}}, "loop.gradient_checkpointing", "true or false, got 'yes'$"),
        ({"trainer": {"name": "align", "lora": {"rank": "3"}}}, "trainer.lora.rank", "integer, got '3'$"),
        ({"data": {"name": "scenes", "words": ["1", 2]}}, "data.words.0", "integer, got '1'$"),
        ({"loop": {"precision": "bfloat16"}}, "loop.precision", "got 'bfloat16'.*'bf16'"),
        ({"backbone": {**ALIGN["backbone"], "dtype": "bf16"}}, "backbone.dtype", "got 'bf16'.*'bfloat16'"),
        ({"lr": 1}, "lr", r"'loop\.lr'"),
        ({"steps": 1}, "steps", r"'loop\.steps'"),
        ({"batch_size": 1}, "batch_size", r"'loop\.batch_size'"),
        ({"batchsize": 1}, "batchsize", r"'loop\.batch_size'"),
        ({"trainer": {"name": "align", "lora": {"rnk": 3}}}, "trainer.lora.rnk", "'rank'"),
        (
            {"rewards": [{"name": "sum", "terms": [{"reward": {"name": "clip", "chekpoint": "x"}}]}]},
            "rewards.0.terms.0.reward.chekpoint",
            "'checkpoint'",
        ),
        ({"seed": "x" * 300}, "seed", r"xxx\.\.\.$"),
    ],
)
def test_load_config_problem_has_path_and_value_of_file(keys, path, message):
    messages = problems({**ALIGN, **keys})
    assert list(messages) == [path]
    assert re.search(message, messages[path])
    assert len(messages[path]) < 200


def test_load_config_rejects_missing_and_unknown_parts():
    assert "required" in problems({"encoder": "clip-segment"})["backbone"]
    assert re.search("'name'.* sd, .*got 3", problems({**ALIGN, "backbone": 3})["backbone"])
    assert "list, got {'name': 'clip'}" in problems({**ALIGN, "rewards": {"name": "clip"}})["rewards"]
    assert problems({**ALIGN, "monitor": {"prompts": []}})["monitor.prompts"]
    assert "'monitor'" in problems({**ALIGN, "validation": {"prompts": ["a"]}})["validation"]


@pytest.mark.parametrize(
    ("keys", "path", "message"),
    [
        ({"prompts": None}, "monitor.prompts", "prompts or data, got neither"),
        ({"data": "scenes"}, "monitor.prompts", "prompts or data, got both"),
        ({"seeds": [1, 2, 1]}, "monitor.seeds", "got 1 more than once"),
        ({"metrics": ["gauges", "gauges"]}, "monitor.metrics", "gauges.*label"),
        ({"metrics": ["nothing"]}, "monitor.metrics.0.name", "'nothing'"),
        ({"keep_best": {"metric": "facts"}}, "monitor.keep_best.metric", "'facts', only gauges;"),
        ({"early_stop": {"metric": "gaugesx", "patience": 1}}, "monitor.early_stop.metric", "'gaugesx'"),
        ({"keep_best": {"metric": "gauges.dark", "guard": {"metric": "x", "at_most_worse": 0.1}}},
         "monitor.keep_best.guard.metric", "'x', only gauges;"),
    ],
)  # fmt: skip
def test_load_config_rejects_invalid_monitor(keys, path, message):
    found = problems({**ALIGN, "monitor": {"prompts": ["a"], "metrics": ["gauges"], **keys}})
    assert list(found) == [path] and re.search(message, found[path])


def test_load_config_rejects_incompatible_parts():
    messages = problems({**ALIGN, "trainer": "reward"})
    assert list(messages) == ["rewards"] and "'reward'" in messages["rewards"]
    assert re.search("'align' .*no rewards, got 1", problems({**ALIGN, "rewards": ["clip"]})["rewards"])
    assert re.search("required.* trainer", problems({**ALIGN, "data": None})["data"])


def test_trackers_accept_single_name():
    assert load_config({**ALIGN, "loop": {"trackers": "wandb"}}).loop.trackers == ("wandb",)


def test_override_changes_values_parts_and_list_entries():
    config = load_config(REWARD)
    changed = override(config, {"encoder": "t5", "rewards.0.omega": 0.0, "loop.lr": 1e-4})
    assert changed.encoder.name == "t5"
    assert (changed.rewards[0].omega, config.rewards[0].omega) == (0.0, 0.3)
    assert changed.loop.lr == 1e-4
    assert diff(config, changed).keys() == {"encoder", "rewards.0.omega", "loop.lr"}


def test_override_part_by_name_resets_its_keys():
    changed = override(ALIGN, {"encoder": "clip-truncate", "encoder.checkpoint": "here"})
    assert to_dict(changed)["encoder"] == to_dict(
        load_config({**ALIGN, "encoder": {"name": "clip-truncate", "checkpoint": "here"}})
    )["encoder"]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("loop.step", "'steps'"),
        ("lop.steps", "no key 'lop'.*'loop'"),
        ("qqq.steps", "no key 'qqq'; available: backbone, "),
        ("rewards.0.omega", "'0' in rewards, .*set rewards"),
        ("monitor.every", "monitor is None .*set monitor"),
        ("seed.x", "seed is 0 .*set seed"),
    ],
)
def test_override_rejects_missing_path(path, message):
    with pytest.raises(ConfigError) as error:
        override(ALIGN, {path: 1})
    assert error.value.errors[0][0] == path
    assert re.search(message, error.value.errors[0][1])


def test_override_reports_all_missing_paths():
    with pytest.raises(ConfigError) as error:
        override(ALIGN, {"a.b": 1, "rewards.3": "clip"})
    assert [path for path, _ in error.value.errors] == ["a.b", "rewards.3"]


def test_override_with_diff_gives_second_config():
    a, b = load_config(ALIGN), load_config(REWARD)
    differences = diff(a, b)
    assert override(a, {path: new for path, (_, new) in differences.items()}) == b
    assert override(b, {path: old for path, (old, _) in differences.items()}) == a
    assert diff(a, a) == {}
    assert diff(a, override(a, {"loop.steps": 7, "loop.betas": [0.8, 0.99]})) == {
        "loop.steps": (1000, 7),
        "loop.betas.0": (0.9, 0.8),
        "loop.betas.1": (0.999, 0.99),
    }


def test_yaml_reads_1e4_as_number_and_no_as_string(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(load_config(ALIGN)).replace("lr: 3.0e-05", "lr: 1e-4").replace("'no'", "no"))
    config = load_config(path)
    assert config.loop.lr == 1e-4
    assert config.loop.precision == "no"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nseed: 2\n", r"a\.yaml, line 2: .*'seed' is repeated"),
        ("a.yaml", "loop:\n  lr: 1\n  lr: 2\n", "line 3: .*'lr' is repeated"),
        ("a.yaml", "- a\n- b\n", r"mapping .*got \['a', 'b'\]"),
        ("a.yaml", "", "mapping .*got None"),
        ("a.yaml", "a: [1,\n", r"a\.yaml, line 2: "),
        ("a.yaml", "1: a\n", r"a\.yaml: keys .*strings, got 1"),
        ("a.json", '{"seed": 1, "seed": 2}', r"a\.json: .*'seed' is repeated"),
        ("a.json", "[1]", r"mapping .*got \[1\]"),
        ("a.json", "{", r"a\.json: "),
        ("a.toml", "", r"a\.toml .*\.yaml, \.yml, \.json"),
        ("a.safetensors", "short", r"a\.safetensors .*not a safetensors file"),
    ],
)
def test_load_config_rejects_invalid_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / name)
    assert re.search(message, str(error.value))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: !!bool x", "the tag 'tag:yaml.org,2002:bool'"),
        ("a.yaml", "seed: !!timestamp x", "the tag"),
        ("a.yaml", "seed: !!int ''", "the tag"),
        ("a.yaml", "seed: !!python/object:os.system {}", "the tag"),
        ("a.yaml", "? !!set {a}\n: b", "the tag"),
        ("a.yaml", "? [a]\n: b", "cannot be a key"),
        ("a.yaml", f"seed: {'9' * 5000}", "too many digits"),
        ("a.json", f'{{"seed": {"9" * 5000}}}', "too many digits"),
        ("a.yaml", f"seed: {'[' * 3000}", "nested too deeply"),
        ("a.yaml", f"seed: {'[' * 70}{']' * 70}", "64 levels"),
        ("a.json", f'{{"seed": {"[" * 100_000}', "nested too deeply"),
        ("a.json", f'{{"seed": {"[" * 70}{"]" * 70}}}', "64 levels"),
        ("a.yaml", f"{LAUGHS}seed: *a29", "20000 values"),
        ("a.yaml", f"{MERGES}seed: *a39", "a0: this key does not exist"),
        ("a.yaml", "seed: &a [*a]", "64 levels"),
        ("a.yaml", "a: &a {<<: *a}", "a: this key does not exist"),
        ("a.yaml", "seed: =", "got '='"),
        ("a.yaml", "seed: \u0665", "got '\u0665'"),
        ("a.yaml", "<<: 3", "expected a mapping"),
        ("a.yaml", "\0" * 100, "a.yaml"),
    ],
)
def test_load_config_rejects_malicious_yaml_and_json(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / name)
    assert message in str(error.value)
    assert len(str(error.value)) < 7000


def test_load_config_rejects_endless_file(tmp_path):
    (tmp_path / "a.yaml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"a\.yaml .*\b1048576\b"):
        load_config(tmp_path / "a.yaml")


def test_yaml_merge_keeps_first_and_own_keys(tmp_path):
    text = to_yaml(load_config(ALIGN)).replace(
        "loop:\n", "loop:\n  <<: [{workers: 2, keep: 7}, {keep: 9, log_every: 3}]\n"
    )
    (tmp_path / "a.yaml").write_text(text.replace("  keep: 2\n", "").replace("  workers: 0\n", ""))
    loop = load_config(tmp_path / "a.yaml").loop
    assert (loop.workers, loop.keep, loop.log_every) == (2, 7, 10)


def test_load_config_of_many_keys_takes_linear_time(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({f"key{i}": i for i in range(40_000)}))
    (tmp_path / "a.json").write_text(json.dumps({f"key{i}": i for i in range(9_000)}))
    before = time.process_time()
    with pytest.raises(ConfigError, match="key0: ") as error:
        load_config(tmp_path / "a.json")
    assert len(error.value.errors) > 9_000
    assert len(str(error.value)) < 10_000
    with pytest.raises(ConfigError, match=r"\b20000 values"):
        load_config(tmp_path / "b.json")
    assert time.process_time() - before < 10


def test_load_config_rejects_cyclic_and_shared_mappings():
    cyclic = {"name": "concat", "parts": []}
    cyclic["parts"] += [cyclic, cyclic]
    shared = {"name": "clip-segment"}
    for _ in range(30):
        shared = {"name": "concat", "parts": [shared, shared]}
    for encoder, message in ((cyclic, "64 levels"), (shared, "20000 values")):
        with pytest.raises(ConfigError, match=message):
            load_config({**ALIGN, "encoder": encoder})
        with pytest.raises(ConfigError, match=message):
            encoders.validate(encoder)


@pytest.mark.parametrize("metadata", [None, [1], 3, {"config": 3}, {"config": None}, "x"])
def test_load_config_names_file_with_damaged_metadata(tmp_path, metadata):
    write_checkpoint(tmp_path / "c", metadata)
    with pytest.raises(ConfigError, match=r"longalign\.safetensors is damaged"):
        load_config(tmp_path / "c")


def test_load_config_names_file_with_deeply_nested_header(tmp_path):
    header = b"[" * 100_000
    (tmp_path / "longalign.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError, match=r"longalign\.safetensors is not a safetensors file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards.\u00b2.omega": 1},
        {3: 1},
        {"loop": {1: 2}, "loop.x.y": 3},
        {"rewards": [1], "rewards." + "9" * 5000: 2},
    ],
)
def test_override_rejects_invalid_paths(changes):
    with pytest.raises(ConfigError):
        override(ALIGN, changes)


def test_shorten_is_bounded_and_redacts_credentials():
    laughs = ["x"]
    for _ in range(100):
        laughs = [laughs] * 10
    assert len(shorten(laughs)) == 80
    assert shorten((1,)) == "(1,)"
    assert shorten({"a": [1, "b"]}) == repr({"a": [1, "b"]})
    assert shorten(10**9999) == "a number of about 9999 digits"
    assert "secret" not in shorten({"files": f"https://user:secret@host/{'x' * 100}"})
    assert "secret" not in shorten("https://" + "u" * 75 + ":secret@host")
    url = "https://me:secret@host:8080/a/b.parquet?X-Amz-Signature=secret&part=3&token=secret"
    assert redact_url(url) == "https://***@host:8080/a/b.parquet?X-Amz-Signature=***&part=3&token=***"
    assert redact_url("s3://bucket/a@b.parquet, a@b.c") == "s3://bucket/a@b.parquet, a@b.c"


def test_load_config_rejects_missing_files(tmp_path):
    (tmp_path / "mini-align.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"mini-aling\.yaml.*'mini-align\.yaml'"):
        load_config(tmp_path / "mini-aling.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config file .*run\.yaml"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*longalign\.safetensors"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"c/longalign\.safetensors .*no config"):
        load_config(write_checkpoint(tmp_path / "c", {"other": "{}"}))


def test_checkpoint_file_returns_newest_of_run(tmp_path):
    for step in (900, 1000, 200):
        write_checkpoint(tmp_path / f"checkpoint-{step:06d}", {})
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_file(tmp_path).parent.name == "checkpoint-001000"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("0.0", 0.0),
        ("3", 3),
        ("-10", -10),
        ("1:30", "1:30"),
        ("1e5", 1e5),
        (".5", 0.5),
        ("true", True),
        ("no", "no"),
        ("null", None),
        ("", None),
        ("clip-segment", "clip-segment"),
        ("A cat: a dog", "A cat: a dog"),
        ("a #b", "a #b"),
        ("'3'", "3"),
        ("[1, 2]", [1, 2]),
        ("{name: t5, max_tokens: 8}", {"name": "t5", "max_tokens": 8}),
        ("[broken", "[broken"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_parse_value(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_parse_assignments():
    assert parse_assignments(["a.b=1", "c=x=y"]) == {"a.b": 1, "c": "x=y"}
    with pytest.raises(ConfigError) as error:
        parse_assignments(["a", "b=1", "b=2", "=3"])
    assert [path for path, _ in error.value.errors] == ["a", "b", "=3"]


def test_config_is_frozen_and_loop_rejects_infinity():
    config = load_config(ALIGN)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="finite"):
        LoopConfig(lr=float("inf"))
    assert isinstance(config, RunConfig)
