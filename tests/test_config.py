"""Runs as values: read, checked, changed, compared."""

import json
import struct
import time
from pathlib import Path

import pytest
import yaml

from longalign.config import LoopConfig, RunConfig, diff, load_config, override, to_dict, to_json, to_yaml
from longalign.errors import ConfigError, redact_url, shorten
from longalign.files import checkpoint_file, parse_assignments, parse_value
from longalign.registry import encoders

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.y*ml"))

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
    "validation": {"prompts": ["a", "b"]},
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
def test_a_config_survives_every_kind_of_dump(source, tmp_path):
    config = load_config(source)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "run.json").write_text(to_json(config))
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoint-000100", {"config": to_json(config)})
    for again in (config, to_dict(config), tmp_path / "run.yaml", tmp_path / "run.json", checkpoint, tmp_path / "run"):
        assert load_config(again) == config
        assert to_dict(load_config(again)) == to_dict(config)
    assert load_config(str(checkpoint / "longalign.safetensors")) == config


def test_a_dump_holds_all_defaults_down_to_the_leaves():
    tree = to_dict(load_config(REWARD))
    assert tree["rewards"][0]["omega"] == 0.3
    assert tree["rewards"][0]["inner"]["text"] == "segments"
    assert tree["encoder"]["parts"][0]["segmenter"]["name"] == "sentence"
    assert tree["trainer"]["lora"]["rank"] == 32
    assert tree["trainer"]["gradient_steps"] == {"name": "last", "k": 2, "detach": True}
    assert tree["loop"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_loads_and_survives_dump_and_load(path):
    config = load_config(path)
    assert load_config(yaml.safe_load(to_yaml(config))) == config


def test_all_faults_at_once_each_with_its_path():
    source = {
        **REWARD,
        "encoder": {"name": "concat", "parts": [{"name": "clip-segment", "modle": 1}, {"name": "t6"}]},
        "rewards": [{"name": "reweighted", "omega": "much", "inner": {"name": "denscore", "chekpoint": "x"}}],
        "loop": {"step": 5, "batch_size": 0, "betas": [0.9, 1.5]},
        "trianer": "align",
        "seed": -1,
    }
    found = problems(source)
    assert found["encoder.parts.0.modle"].startswith("this key does not exist")
    assert "did you mean 't5'" in found["encoder.parts.1.name"]
    assert found["rewards.0.inner.chekpoint"] == "this key does not exist; did you mean 'checkpoint'?"
    assert "got 'much'" in found["rewards.0.omega"]
    assert found["loop.step"] == "this key does not exist; did you mean 'steps'?"
    assert found["loop.batch_size"].endswith("got 0")
    assert found["loop.betas.1"].endswith("got 1.5")
    assert found["trianer"] == "this key does not exist; did you mean 'trainer'?"
    assert found["seed"].endswith("got -1")
    assert len(found) == 9


@pytest.mark.parametrize(
    ("keys", "path", "message"),
    [
        ({"validation": {"prompts": 3}}, "validation.prompts", "expected a list or expected text, got 3"),
        ({"loop": 3}, "loop", "expected a mapping, got 3"),
        ({"loop": {"steps": 1.5}}, "loop.steps", "expected a whole number, got 1.5"),
        ({"loop": {"trackers": "wandbb"}}, "loop.trackers.0", "did you mean 'wandb'?"),
        ({"loop": {"steps": True}}, "loop.steps", "expected a whole number, got True"),
        ({"loop": {"steps": "5"}}, "loop.steps", "expected a whole number, got '5'"),
        ({"loop": {"steps": 5.0}}, "loop.steps", "expected a whole number, got 5.0"),
        ({"loop": {"steps": 10**30}}, "loop.steps", "got 1000000000000000000000000000000"),
        ({"loop": {"batch_size": 10**12}}, "loop.batch_size", "less than or equal to 1000000, got 1000000000000"),
        ({"loop": {"lr": "fast"}}, "loop.lr", "expected a number, got 'fast'"),
        ({"loop": {"lr": True}}, "loop.lr", "expected a number, got True"),
        ({"loop": {"gradient_checkpointing": "yes"}}, "loop.gradient_checkpointing", "expected true or false"),
        (
            {"trainer": {"name": "align", "lora": {"rank": "3"}}},
            "trainer.lora.rank",
            "expected a whole number, got '3'",
        ),
        ({"data": {"name": "scenes", "words": ["1", 2]}}, "data.words.0", "expected a whole number, got '1'"),
        ({"loop": {"precision": "bfloat16"}}, "loop.precision", "got 'bfloat16'; did you mean 'bf16'?"),
        ({"backbone": {**ALIGN["backbone"], "dtype": "bf16"}}, "backbone.dtype", "did you mean 'bfloat16'?"),
        ({"lr": 1}, "lr", "this key does not exist; did you mean 'loop.lr'?"),
        ({"steps": 1}, "steps", "did you mean 'loop.steps'?"),
        ({"batch_size": 1}, "batch_size", "did you mean 'loop.batch_size'?"),
        ({"batchsize": 1}, "batchsize", "did you mean 'loop.batch_size'?"),
        ({"trainer": {"name": "align", "lora": {"rnk": 3}}}, "trainer.lora.rnk", "did you mean 'rank'?"),
        (
            {"rewards": [{"name": "sum", "terms": [{"reward": {"name": "clip", "chekpoint": "x"}}]}]},
            "rewards.0.terms.0.reward.chekpoint",
            "did you mean 'checkpoint'?",
        ),
        ({"seed": "x" * 300}, "seed", "x..."),
    ],
)
def test_paths_and_words_are_those_of_the_file(keys, path, message):
    found = problems({**ALIGN, **keys})
    assert list(found) == [path]
    assert message in found[path]
    assert len(found[path]) < 200


def test_missing_and_unknown_parts():
    assert problems({"encoder": "clip-segment"})["backbone"] == "this key is required"
    assert "expected a name or a mapping with 'name'" in problems({**ALIGN, "backbone": 3})["backbone"]
    assert problems({**ALIGN, "rewards": {"name": "clip"}})["rewards"].startswith("expected a list")
    assert problems({**ALIGN, "validation": {"prompts": []}})["validation.prompts"]


def test_parts_that_do_not_go_together_are_refused_before_anything_is_loaded():
    assert problems({**ALIGN, "trainer": "reward"}) == {"rewards": "'reward' needs at least one reward"}
    assert "uses no rewards" in problems({**ALIGN, "rewards": ["clip"]})["rewards"]
    assert "required where there is a trainer" in problems({**ALIGN, "data": None})["data"]


def test_one_tracker_is_a_list_of_one():
    assert load_config({**ALIGN, "loop": {"trackers": "wandb"}}).loop.trackers == ("wandb",)


def test_override_changes_leaves_parts_and_list_entries():
    config = load_config(REWARD)
    changed = override(config, {"encoder": "t5", "rewards.0.omega": 0.0, "loop.lr": 1e-4})
    assert changed.encoder.name == "t5"
    assert (changed.rewards[0].omega, config.rewards[0].omega) == (0.0, 0.3)
    assert changed.loop.lr == 1e-4
    assert diff(config, changed).keys() == {"encoder", "rewards.0.omega", "loop.lr"}


def test_a_part_replaced_by_name_has_only_its_own_defaults_and_can_be_set_further():
    changed = override(ALIGN, {"encoder": "clip-truncate", "encoder.checkpoint": "here"})
    assert to_dict(changed)["encoder"] == to_dict(
        load_config({**ALIGN, "encoder": {"name": "clip-truncate", "checkpoint": "here"}})
    )["encoder"]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("loop.step", "did you mean 'steps'"),
        ("lop.steps", "there is no 'lop'; did you mean 'loop'?"),
        ("qqq.steps", "there is no 'qqq'; available: backbone, "),
        ("rewards.0.omega", "there is no entry '0' in rewards, which is empty; set rewards as a whole"),
        ("validation.every", "there is nothing inside validation, which is None; set validation as a whole"),
        ("seed.x", "there is nothing inside seed"),
    ],
)
def test_an_override_through_a_missing_path_is_an_error(path, message):
    with pytest.raises(ConfigError) as error:
        override(ALIGN, {path: 1})
    assert error.value.errors[0][0] == path
    assert message in error.value.errors[0][1]


def test_all_missing_paths_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        override(ALIGN, {"a.b": 1, "rewards.3": "clip"})
    assert [path for path, _ in error.value.errors] == ["a.b", "rewards.3"]


def test_the_second_values_of_a_diff_make_the_second_config():
    a, b = load_config(ALIGN), load_config(REWARD)
    found = diff(a, b)
    assert override(a, {path: new for path, (_, new) in found.items()}) == b
    assert override(b, {path: old for path, (old, _) in found.items()}) == a
    assert diff(a, a) == {}
    assert diff(a, override(a, {"loop.steps": 7, "loop.betas": [0.8, 0.99]})) == {
        "loop.steps": (1000, 7),
        "loop.betas.0": (0.9, 0.8),
        "loop.betas.1": (0.999, 0.99),
    }


def test_yaml_reads_plain_numbers_and_words(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(load_config(ALIGN)).replace("lr: 3.0e-05", "lr: 1e-4").replace("'no'", "no"))
    config = load_config(path)
    assert config.loop.lr == 1e-4
    assert config.loop.precision == "no"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nseed: 2\n", "a.yaml, line 2: the key 'seed' is repeated"),
        ("a.yaml", "loop:\n  lr: 1\n  lr: 2\n", "line 3: the key 'lr' is repeated"),
        ("a.yaml", "- a\n- b\n", "expected a mapping of keys to values, got ['a', 'b']"),
        ("a.yaml", "", "expected a mapping of keys to values, got None"),
        ("a.yaml", "a: [1,\n", "a.yaml, line 2: "),
        ("a.yaml", "1: a\n", "a key must be a word, got 1"),
        ("a.json", '{"seed": 1, "seed": 2}', "the key 'seed' is repeated"),
        ("a.json", "[1]", "expected a mapping of keys to values, got [1]"),
        ("a.json", "{", "a.json: "),
        ("a.toml", "", "neither .yaml, .yml, .json nor a checkpoint"),
        ("a.safetensors", "short", "is not a safetensors file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / name)
    assert message in str(error.value)


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
        ("a.yaml", "<<: 3", "takes mappings"),
        ("a.yaml", "\0" * 100, "a.yaml"),
    ],
)
def test_texts_made_to_break_the_reader_are_config_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / name)
    assert message in str(error.value)
    assert len(str(error.value)) < 7000


def test_a_config_without_end_is_no_config(tmp_path):
    (tmp_path / "a.yaml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="more than 1048576 characters"):
        load_config(tmp_path / "a.yaml")


def test_merged_mappings_keep_the_first_and_their_own_keys(tmp_path):
    text = to_yaml(load_config(ALIGN)).replace(
        "loop:\n", "loop:\n  <<: [{workers: 2, keep: 7}, {keep: 9, log_every: 3}]\n"
    )
    (tmp_path / "a.yaml").write_text(text.replace("  keep: 2\n", "").replace("  workers: 0\n", ""))
    loop = load_config(tmp_path / "a.yaml").loop
    assert (loop.workers, loop.keep, loop.log_every) == (2, 7, 10)


def test_many_keys_are_read_in_linear_time(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({f"key{i}": i for i in range(40_000)}))
    (tmp_path / "a.json").write_text(json.dumps({f"key{i}": i for i in range(9_000)}))
    before = time.process_time()
    with pytest.raises(ConfigError, match="key0: this key does not exist") as error:
        load_config(tmp_path / "a.json")
    assert len(error.value.errors) > 9_000
    assert len(str(error.value)) < 10_000
    with pytest.raises(ConfigError, match="at most 20000 values"):
        load_config(tmp_path / "b.json")
    assert time.process_time() - before < 10


def test_mappings_that_hold_themselves_or_share_too_much_are_config_errors():
    itself = {"name": "concat", "parts": []}
    itself["parts"] += [itself, itself]
    shared = {"name": "clip-segment"}
    for _ in range(30):
        shared = {"name": "concat", "parts": [shared, shared]}
    for encoder, message in ((itself, "64 levels"), (shared, "20000 values")):
        with pytest.raises(ConfigError, match=message):
            load_config({**ALIGN, "encoder": encoder})
        with pytest.raises(ConfigError, match=message):
            encoders.validate(encoder)


@pytest.mark.parametrize("metadata", [None, [1], 3, {"config": 3}, {"config": None}, "x"])
def test_damaged_metadata_is_an_error_that_names_the_file(tmp_path, metadata):
    write_checkpoint(tmp_path / "c", metadata)
    with pytest.raises(ConfigError, match=r"longalign\.safetensors is damaged"):
        load_config(tmp_path / "c")


def test_a_header_nested_without_end_is_an_error_that_names_the_file(tmp_path):
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
def test_paths_that_are_none_are_config_errors(changes):
    with pytest.raises(ConfigError):
        override(ALIGN, changes)


def test_what_came_is_shown_in_bounded_time_and_without_credentials():
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


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "mini-align.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"mini-aling\.yaml; did you mean 'mini-align\.yaml'\?"):
        load_config(tmp_path / "mini-aling.yaml")
    with pytest.raises(FileNotFoundError, match="no config file"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="carries no config"):
        load_config(write_checkpoint(tmp_path / "c", {"other": "{}"}))


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path):
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
def test_values_of_the_command_line(text, value):
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_assignments_of_the_command_line():
    assert parse_assignments(["a.b=1", "c=x=y"]) == {"a.b": 1, "c": "x=y"}
    with pytest.raises(ConfigError) as error:
        parse_assignments(["a", "b=1", "b=2", "=3"])
    assert [path for path, _ in error.value.errors] == ["a", "b", "=3"]


def test_a_config_is_frozen_and_loop_is_checked():
    config = load_config(ALIGN)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="finite"):
        LoopConfig(lr=float("inf"))
    assert isinstance(config, RunConfig)
