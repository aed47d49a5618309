"""Checks of a run's files: all problems at once, before heavy imports."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml
from huggingface_hub import errors

from longalign import hub
from longalign.checkpoints.checkpoint import load_for_sampling
from longalign.config.changes import override
from longalign.config.checks import check_files, check_parts
from longalign.config.run import load_config, to_json
from longalign.errors import ConfigError
from longalign.files.paths import find_checkpoint
from longalign.loop.fit import fit
from longalign.registry import REGISTRIES, rewards
from longalign.rewards.config import RewardConfig
from longalign.runtime import Runtime
from longalign.sizes import Size

ALIGN = {
    "backbone": {"name": "sd", "checkpoint": "mini/sd"},
    "encoder": {"name": "clip-segment", "checkpoint": "mini/sd"},
    "trainer": "align",
    "data": "scenes",
}


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def file_problems(changes, **settings):
    with pytest.raises(ConfigError) as error:
        check_files(override(ALIGN, {"output": "out", **changes}), **settings)
    return dict(error.value.errors)


def write_config(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_check_files_accepts_bundled_weights():
    check_files(override(ALIGN, {"output": "out"}))


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"backbone.checkpoint": "mini/nothing"}, "backbone.checkpoint", "'mini/nothing'"),
        ({"backbone.checkpoint": "/no/where"}, "backbone.checkpoint", "'/no/where'"),
        ({"backbone.checkpoint": "owner/name"}, "backbone.checkpoint", "HF_HUB_OFFLINE"),
        ({"backbone.checkpoint": "mini/clip"}, "backbone.checkpoint", "'mini/clip' .*unet/config.json"),
        ({"backbone.checkpoint": "no.safetensors"}, "backbone.checkpoint", r"no\.safetensors"),
        ({"encoder.checkpoint": "mini/nothing"}, "encoder.checkpoint", "'mini/nothing'"),
        ({"encoder": {"name": "t5", "checkpoint": "mini/t5"}}, "encoder", r"'t5' .*width \d+, .*'sd' .*\d+"),
        ({"encoder": {"name": "concat", "parts": [ALIGN["encoder"], {"name": "t5", "checkpoint": "mini/t5"}]}},
         "encoder.parts", "'t5'"),
        ({"init_from": "nowhere"}, "init_from", "no checkpoint in nowhere"),
        ({"init_from": "mini/sd"}, "init_from", "'mini/sd' .*base model"),
        ({"data": {"name": "folder", "folder": "nowhere"}}, "data.folder", "no folder .*nowhere"),
        ({"data": {"name": "folder", "folder": "."}}, "data.folder", r"metadata\.jsonl"),
        ({"data": {"name": "pairs", "folder": "."}, "trainer": "denscore", "backbone": None, "encoder": None,
          "rewards": [{"name": "clip", "checkpoint": "mini/clip"}]}, "data.folder", r"no file .*metadata\.jsonl"),
        ({"data": {"name": "folder", "folder": ".", "resolution": 63}}, "data.resolution", r"\b8\b.*got 63"),
        ({"data": {"name": "webdataset", "shards": "s-{0..99999999}.tar"}}, "data.shards", r"\bs-0\.tar"),
        ({"data": {"name": "webdataset", "shards": "s-{9..1}.tar"}}, "data.shards", r"\b9\b.*\b1\b"),
        ({"data": {"name": "longalign-captions", "folders": {"a": "nowhere"}}}, "data.folders.a", r"\bnowhere\b"),
        ({"data": {"name": "hf", "dataset": "parquet", "files": ["x.parquet"]}}, "data.files", r"\bx\.parquet"),
        ({"monitor": {"prompts": "no.txt"}}, "monitor.prompts", r"\bno\.txt"),
        ({"monitor": {"prompts": ["a"], "metrics": [{"name": "frechet", "reference": "x",
                                                    "reward": {"name": "clip", "checkpoint": "mini/clip"}}]}},
         "monitor.metrics.0.reference", r"\bx;"),
    ],
)  # fmt: skip
def test_check_files_names_key_of_missing_or_mismatched_file(changes, path, message):
    if "resolution" in str(changes):
        Path("a.txt").touch()
    problems = file_problems(changes)
    assert list(problems) == [path]
    assert re.search(message, problems[path])


REWARD = {"trainer": "reward", "data": {"name": "prompts", "file": "p.txt"}}


@pytest.mark.parametrize(
    ("reward", "path", "message"),
    [
        ({"name": "clip", "checkpoint": "mini/nothing"}, "rewards.0.checkpoint", "'mini/nothing'"),
        ({"name": "clip", "checkpoint": "mini/clip", "processor": "/x"}, "rewards.0.processor", "'/x'"),
        ({"name": "hpsv2", "checkpoint": "x.pt"}, "rewards.0.checkpoint", "'x.pt'"),
        ({"name": "reweighted", "direction": "no.safetensors", "inner": {"name": "clip", "checkpoint": "mini/clip"}},
         "rewards.0.direction", r"\bno\.safetensors"),
        ({"name": "edited", "inner": {"name": "clip", "checkpoint": "mini/clip"},
          "edit": {"name": "measured", "file": "no.safetensors"}},
         "rewards.0.edit.file", r"\bno\.safetensors.*compute-direction"),
        ({"name": "sum", "terms": [{"reward": {"name": "clip", "checkpoint": "mini/x"}}]},
         "rewards.0.terms.0.reward.checkpoint", "'mini/x'"),
    ],
)  # fmt: skip
def test_check_files_and_check_parts_of_rewards(reward, path, message):
    problems = file_problems({**REWARD, "rewards": [reward], "trainer.resolution": 63})
    assert list(problems) == [path, "data.file", "trainer.resolution"] or set(problems) == {
        path,
        "data.file",
        "trainer.resolution",
    }
    assert re.search(message, problems[path])
    with pytest.raises(ConfigError, match=path.replace("rewards.0", "mine")):
        check_parts({"mine": rewards.validate(reward)})


@pytest.mark.parametrize(
    ("backbone", "encoder", "message"),
    [
        ("sd3", "clip-segment", "'sd3' needs .*pooled embedding.*'clip-segment'.* none"),
        ("sdxl", {"name": "concat", "parts": ["clip-segment", "t5"]}, "'sdxl' needs .*pooled embedding.*'concat'"),
        ("sd", "clip-segment-sdxl", "'sd' takes no pooled embedding.*'clip-segment-sdxl'.* one"),
    ],
)
def test_load_config_rejects_encoder_of_different_model(backbone, encoder, message):
    with pytest.raises(ConfigError) as error:
        load_config({**ALIGN, "backbone": {"name": backbone, "checkpoint": "x/y"}, "encoder": encoder})
    assert error.value.errors[0][0] == "encoder"
    assert re.search(message, error.value.errors[0][1])


CLIP = {"name": "clip", "checkpoint": "mini/clip"}
REWEIGHTED_SUM = {"name": "reweighted", "inner": {"name": "sum", "terms": [{"reward": CLIP}]}}


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"rewards": [CLIP, "flat"]}, "rewards.1", "'flat' has no gradient .*'reward' requires"),
        ({"rewards": [{"name": "sum", "terms": [{"reward": "flat"}]}]}, "rewards.0", "'sum' has no gradient"),
        ({"rewards": [{"name": "reweighted", "inner": "flat"}]}, "rewards.0.inner", "'flat' .*embeddings"),
        ({"rewards": [REWEIGHTED_SUM]}, "rewards.0.inner", "'sum' .*embeddings"),
        ({"rewards": []}, "rewards", "needs at least one reward"),
        ({"rewards": [CLIP], "trainer": "align"}, "rewards", "'align' uses no rewards"),
        ({"rewards": [CLIP], "data": "scene-pairs"}, "data", "two images per prompt"),
        ({"rewards": [CLIP], "trainer": "denscore"}, "data", "needs two images per prompt"),
        ({"trainer": "align", "data": {"name": "prompts", "file": "p.txt"}}, "data", "needs images"),
    ],
)  # fmt: skip
def test_load_config_names_key_of_parts_that_do_not_fit(changes, path, message):
    class FlatConfig(RewardConfig):
        target = "tests:Flat"
        name: Literal["flat"] = "flat"
        differentiable = False

    rewards.register("flat", FlatConfig)
    try:
        with pytest.raises(ConfigError) as error:
            load_config({**ALIGN, "trainer": "reward", **changes})
    finally:
        rewards.unregister("flat")
    problems = dict(error.value.errors)
    assert re.search(message, problems[path])


def test_concat_rejects_two_pooled_embeddings():
    with pytest.raises(ConfigError, match="pooled embedding, got clip-segment-sdxl, clip-segment-sd3"):
        load_config({**ALIGN, "encoder": {"name": "concat", "parts": ["clip-segment-sdxl", "clip-segment-sd3"]}})


def test_check_files_compares_sdxl_and_sd3_widths(tmp_path):
    write_config(tmp_path / "m" / "text_encoder", hidden_size=3, projection_dim=3)
    write_config(tmp_path / "m" / "text_encoder_2", hidden_size=5, projection_dim=7)
    write_config(tmp_path / "m" / "vae", block_out_channels=[1, 2])
    write_config(
        tmp_path / "m" / "unet",
        cross_attention_dim=8,
        projection_class_embeddings_input_dim=18,
        addition_time_embed_dim=2,
    )
    write_config(tmp_path / "m" / "transformer", joint_attention_dim=4096, pooled_projection_dim=10, patch_size=2)
    sdxl = {
        "backbone": {"name": "sdxl", "checkpoint": "m"},
        "encoder": {"name": "clip-segment-sdxl", "checkpoint": "m"},
    }
    problems = file_problems(sdxl)
    assert list(problems) == ["encoder"]
    assert re.search("'clip-segment-sdxl' .*pooled embedding of width 7, .*'sdxl' .*6", problems["encoder"])
    sd3 = {"backbone": {"name": "sd3", "checkpoint": "m"}, "encoder": {"name": "clip-segment-sd3", "checkpoint": "m"}}
    check_files(override(ALIGN, {**sd3, "output": "out"}))
    assert "width 9," in file_problems({**sd3, "encoder.width": 9})["encoder"]
    resolution = {"data": {"name": "folder", "folder": ".", "resolution": 6}}
    assert re.search(r"\b4\b.*got 6", file_problems({**sd3, **resolution})["data.resolution"])


def test_check_files_rejects_used_output_and_missing_tracker(monkeypatch):
    folder = Path("out/checkpoint-000001")
    folder.mkdir(parents=True)
    (folder / "longalign.safetensors").touch()
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else real(name))
    problems = file_problems({"loop.trackers": "wandb"})
    assert re.search(r"a run in out\b", problems["output"])
    assert "pip install wandb" in problems["loop.trackers"]
    check_files(override(ALIGN, {"output": "out"}), resumed=True)
    Path("file").touch()
    assert "expected a folder" in file_problems({"output": "file/out"})["output"]


def test_check_files_skips_text_models_with_prompt_cache():
    config = override(ALIGN, {"encoder.checkpoint": "mini/nothing", "cache": {"folder": "cache"}, "output": "out"})
    check_files(config)
    with pytest.raises(ConfigError, match=r"encoder\.checkpoint: .*'mini/nothing'"):
        check_files(config, cached=False)
    with pytest.raises(ConfigError, match=r"encoder\.checkpoint: .*'mini/nothing'"):
        check_files(override(config, {"cache.prompts": False}))


def test_check_files_rejects_invalid_size():
    with pytest.raises(ConfigError, match=r"--size: .*\b8\b.*'sd'.*got 63"):
        check_files(load_config(ALIGN), training=False, sizes={"--size": [Size(64, 64), Size(63, 63)]})


def test_is_base_model_is_false_for_checkpoint_with_all_weights(tmp_path):
    write_config(tmp_path / "run" / "unet")
    assert hub.is_base_model(str(tmp_path / "run"))
    (tmp_path / "run" / "longalign.safetensors").touch()
    assert not hub.is_base_model(str(tmp_path / "run"))


def test_check_files_for_sampling_ignores_data():
    config = override(ALIGN, {"data": {"name": "folder", "folder": "nowhere"}, "monitor": {"prompts": "no.txt"}})
    check_files(config, training=False)
    with pytest.raises(ConfigError, match=r"backbone\.checkpoint"):
        check_files(override(config, {"backbone.checkpoint": "mini/no"}), training=False)


def test_check_files_reads_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    write_config(repository / "snapshots" / "abc" / "unet", cross_attention_dim=9)
    write_config(repository / "snapshots" / "abc" / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert "width 128" in file_problems({"backbone.checkpoint": "owner/name"})["encoder"]
    assert hub.local_file("owner/name", "vae/config.json", "abc")
    assert "'owner/name'" in hub.availability_problem("owner/name", "other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.availability_problem("owner/other") == ""


def test_check_files_names_failing_plugin_check():
    class MineConfig(RewardConfig):
        name: Literal["mine"] = "mine"

        def build(self, runtime):
            return lambda images, prompts: images

        def check_files(self):
            return 1 / 0

    rewards.register("mine", MineConfig)
    try:
        problems = file_problems({**REWARD, "data": ALIGN["data"], "rewards": ["mine"]})
    finally:
        rewards.unregister("mine")
    assert list(problems) == ["rewards.0"]
    assert re.search("check_files .*'mine' .*ZeroDivisionError: division by zero", problems["rewards.0"])


@pytest.mark.parametrize("command", ["train", "generate", "python"])
def test_file_checks_run_before_importing_torch(tmp_path, command):
    config = {**ALIGN, "data": {"name": "folder", "folder": "nowhere"}, "init_from": "nowhere"}
    config["backbone"] = {"name": "sd", "checkpoint": "mini/nothing"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = {
        "train": "from longalign.cli.main import main; code = main(['train', 'run.yaml'])",
        "generate": "from longalign.cli.main import main\n"
        "code = main(['generate', '--config', 'run.yaml', '--prompt', 'a', '--output', 'out'])",
        "python": "import longalign\ntry: longalign.fit('run.yaml')\n"
        "except longalign.ConfigError as error: code = 2; print(error, file=sys.stderr)",
    }[command]
    text = f"import sys, time\n{run}\nassert code == 2\nassert 'torch' not in sys.modules\nprint(time.process_time())"
    environment = {**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    keys = ["backbone.checkpoint: ", "init_from: ", *(["data.folder: "] if command != "generate" else [])]
    assert all(key in done.stderr for key in keys)
    assert float(done.stdout.splitlines()[-1]) < 2  # 0.35 on an idle machine


def test_hub_why_explains_download_errors(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def reason(kind):
        try:
            try:
                raise kind.__new__(kind)
            except Exception as error:
                raise OSError("long text") from error
        except Exception as error:
            return hub.download_problem(error)

    causes = [errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError]
    causes += [errors.EntryNotFoundError, ConnectionError]
    reasons = [reason(kind) for kind in causes]
    assert len({*reasons, "long text"}) == len(causes) + 1  # each cause has its own message
    assert "hf auth login" in reasons[0] and "repository" in reasons[1] and "revision" in reasons[2]
    assert reason(errors.LocalEntryNotFoundError) == reason(ConnectionError)
    assert reason(KeyError) == "long text"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in reason(errors.LocalEntryNotFoundError)


def test_fit_checks_files_before_building():
    with pytest.raises(ConfigError, match=r"init_from: no checkpoint in nowhere"):
        fit({**ALIGN, "init_from": "nowhere"})


@pytest.mark.parametrize("source", ["mini/sd", "owner/name"])
def test_find_checkpoint_rejects_base_model(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_config(tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc" / "unet")
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / "main").write_text("abc")
    with pytest.raises(FileNotFoundError, match=f"'{source}' .*base model.*--config.*--pipeline"):
        find_checkpoint(source)


@pytest.mark.parametrize(
    "part",
    [
        {"backbones": {"name": "sd", "checkpoint": "owner/name"}},
        {"encoders": {"name": "t5", "checkpoint": "owner/name"}},
        {"rewards": {"name": "clip", "checkpoint": "owner/name"}},
        {"rewards": {"name": "hpsv2", "checkpoint": "owner/name"}},
    ],
)
def test_build_and_find_checkpoint_name_failed_download(part):
    ((kind, config),) = part.items()
    with pytest.raises(ValueError, match=r"'owner/name'.*HF_HUB_OFFLINE"):
        REGISTRIES[kind].build(config, Runtime())
    with pytest.raises(FileNotFoundError, match=r"'owner/name'.*HF_HUB_OFFLINE"):
        find_checkpoint("owner/name")


def test_load_for_sampling_names_missing_base_model(tmp_path):
    folder = tmp_path / "run" / "checkpoint-000001"
    folder.mkdir(parents=True)
    config = load_config({**ALIGN, "backbone": {"name": "sd", "checkpoint": "gone/away"}, "init_from": "not-needed"})
    header = json.dumps({"__metadata__": {"config": to_json(config)}}).encode()
    (folder / "longalign.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError) as error:
        load_for_sampling(folder)
    assert [path for path, _ in error.value.errors] == ["backbone.checkpoint"]
