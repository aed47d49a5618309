"""What of a run's files is wrong, found at once and before anything heavy is imported."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml
from huggingface_hub import errors

from longalign import hub
from longalign.checkpoint import load_for_sampling
from longalign.checks import check_files, check_parts
from longalign.compose import build_from_config
from longalign.config import load_config, override, to_json
from longalign.errors import ConfigError
from longalign.files import find_checkpoint
from longalign.registry import REGISTRIES, PartConfig, rewards
from longalign.runtime import Runtime

ALIGN = {
    "backbone": {"name": "sd", "checkpoint": "mini/sd"},
    "encoder": {"name": "clip-segment", "checkpoint": "mini/sd"},
    "trainer": "align",
    "data": "scenes",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def found(changes, **settings):
    with pytest.raises(ConfigError) as error:
        check_files(override(ALIGN, {"output": "out", **changes}), **settings)
    return dict(error.value.errors)


def network(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_of_bundled_weights_is_all_there():
    check_files(override(ALIGN, {"output": "out"}))


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"backbone.checkpoint": "mini/nothing"}, "backbone.checkpoint", "no bundled weights 'mini/nothing'"),
        ({"backbone.checkpoint": "/no/where"}, "backbone.checkpoint", "there is no file or folder '/no/where'"),
        ({"backbone.checkpoint": "owner/name"}, "backbone.checkpoint", "HF_HUB_OFFLINE"),
        ({"backbone.checkpoint": "mini/clip"}, "backbone.checkpoint", "'mini/clip' does not hold unet/config.json"),
        ({"backbone.checkpoint": "no.safetensors"}, "backbone.checkpoint", "no file no.safetensors"),
        ({"encoder.checkpoint": "mini/nothing"}, "encoder.checkpoint", "no bundled weights"),
        ({"encoder": {"name": "t5", "checkpoint": "mini/t5"}}, "encoder", "width"),
        ({"encoder": {"name": "concat", "parts": [ALIGN["encoder"], {"name": "t5", "checkpoint": "mini/t5"}]}},
         "encoder.parts", "of 't5'"),
        ({"init_from": "nowhere"}, "init_from", "no checkpoint in nowhere"),
        ({"init_from": "mini/sd"}, "init_from", "'mini/sd' is a base model, not a checkpoint of longalign"),
        ({"data": {"name": "folder", "folder": "nowhere"}}, "data.folder", "no folder nowhere"),
        ({"data": {"name": "folder", "folder": "."}}, "data.folder", "has neither metadata.jsonl nor"),
        ({"data": {"name": "pairs", "folder": "."}, "trainer": "denscore", "backbone": None, "encoder": None,
          "rewards": [{"name": "clip", "checkpoint": "mini/clip"}]}, "data.folder", "no file metadata.jsonl"),
        ({"data": {"name": "folder", "folder": ".", "resolution": 63}}, "data.resolution", "expected a multiple of 8"),
        ({"data": {"name": "webdataset", "shards": "s-{0..99999999}.tar"}}, "data.shards", "no shard s-0.tar"),
        ({"data": {"name": "webdataset", "shards": "s-{9..1}.tar"}}, "data.shards", "9 is more than 1"),
        ({"data": {"name": "longalign-captions", "folders": {"a": "nowhere"}}}, "data.folders.a", "no folder nowhere"),
        ({"data": {"name": "hf", "dataset": "parquet", "files": ["x.parquet"]}}, "data.files", "no file x.parquet"),
        ({"validation": {"prompts": "no.txt"}}, "validation.prompts", "no file no.txt"),
    ],
)  # fmt: skip
def test_what_is_missing_or_does_not_fit_is_named_by_its_key(changes, path, message):
    if "resolution" in str(changes):
        Path("a.txt").touch()
    problems = found(changes)
    assert list(problems) == [path]
    assert message in problems[path]


REWARD = {"trainer": "reward", "data": {"name": "prompts", "file": "p.txt"}}


@pytest.mark.parametrize(
    ("reward", "path", "message"),
    [
        ({"name": "clip", "checkpoint": "mini/nothing"}, "rewards.0.checkpoint", "no bundled weights"),
        ({"name": "clip", "checkpoint": "mini/clip", "processor": "/x"}, "rewards.0.processor", "no file or folder"),
        ({"name": "hpsv2", "checkpoint": "x.pt"}, "rewards.0.checkpoint", "no file or folder 'x.pt'"),
        ({"name": "reweighted", "direction": "no.safetensors", "inner": {"name": "clip", "checkpoint": "mini/clip"}},
         "rewards.0.direction", "no file no.safetensors"),
        ({"name": "sum", "terms": [{"reward": {"name": "clip", "checkpoint": "mini/x"}}]},
         "rewards.0.terms.0.reward.checkpoint", "no bundled weights"),
    ],
)  # fmt: skip
def test_files_of_rewards(reward, path, message):
    problems = found({**REWARD, "rewards": [reward], "trainer.resolution": 63})
    assert list(problems) == [path, "data.file", "trainer.resolution"] or set(problems) == {
        path,
        "data.file",
        "trainer.resolution",
    }
    assert message in problems[path]
    with pytest.raises(ConfigError, match=path.replace("rewards.0", "mine")):
        check_parts({"mine": rewards.validate(reward)})


@pytest.mark.parametrize(
    ("backbone", "encoder", "message"),
    [
        ("sd3", "clip-segment", "'sd3' needs a pooled embedding, and 'clip-segment' gives none"),
        ("sdxl", {"name": "concat", "parts": ["clip-segment", "t5"]}, "needs a pooled embedding"),
        ("sd", "clip-segment-sdxl", "'sd' takes no pooled embedding, as 'clip-segment-sdxl' gives one"),
    ],
)
def test_parts_of_different_models_are_found_by_their_configs_alone(backbone, encoder, message):
    with pytest.raises(ConfigError) as error:
        load_config({**ALIGN, "backbone": {"name": backbone, "checkpoint": "x/y"}, "encoder": encoder})
    assert error.value.errors[0][0] == "encoder"
    assert message in error.value.errors[0][1]


def test_at_most_one_part_of_a_concat_has_a_pooled_embedding():
    with pytest.raises(ConfigError, match="at most one part with a pooled embedding, got clip-segment-sdxl, clip-seg"):
        load_config({**ALIGN, "encoder": {"name": "concat", "parts": ["clip-segment-sdxl", "clip-segment-sd3"]}})


def test_widths_of_two_clips_and_of_pooled_embeddings(tmp_path):
    network(tmp_path / "m" / "text_encoder", hidden_size=3, projection_dim=3)
    network(tmp_path / "m" / "text_encoder_2", hidden_size=5, projection_dim=7)
    network(tmp_path / "m" / "vae", block_out_channels=[1, 2])
    network(
        tmp_path / "m" / "unet",
        cross_attention_dim=8,
        projection_class_embeddings_input_dim=18,
        addition_time_embed_dim=2,
    )
    network(tmp_path / "m" / "transformer", joint_attention_dim=4096, pooled_projection_dim=10, patch_size=2)
    sdxl = {
        "backbone": {"name": "sdxl", "checkpoint": "m"},
        "encoder": {"name": "clip-segment-sdxl", "checkpoint": "m"},
    }
    problems = found(sdxl)
    assert list(problems) == ["encoder"]
    assert "pooled embedding of width 7, and the denoiser of 'sdxl' takes 6" in problems["encoder"]
    sd3 = {"backbone": {"name": "sd3", "checkpoint": "m"}, "encoder": {"name": "clip-segment-sd3", "checkpoint": "m"}}
    check_files(override(ALIGN, {**sd3, "output": "out"}))
    assert "width 9, and" in found({**sd3, "encoder.width": 9})["encoder"]
    assert (
        "multiple of 4" in found({**sd3, "data": {"name": "folder", "folder": ".", "resolution": 6}})["data.resolution"]
    )


def test_a_used_output_folder_and_a_missing_tracker(monkeypatch):
    folder = Path("out/checkpoint-000001")
    folder.mkdir(parents=True)
    (folder / "longalign.safetensors").touch()
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else real(name))
    problems = found({"loop.trackers": "wandb"})
    assert "there is a run in out already" in problems["output"]
    assert "pip install wandb" in problems["loop.trackers"]
    check_files(override(ALIGN, {"output": "out"}), resumed=True)
    Path("file").touch()
    assert "file is a file" in found({"output": "file/out"})["output"]


def test_a_cache_of_prompts_takes_the_place_of_text_models():
    config = override(ALIGN, {"encoder.checkpoint": "mini/nothing", "cache": {"folder": "cache"}, "output": "out"})
    check_files(config)
    with pytest.raises(ConfigError, match=r"encoder\.checkpoint: no bundled weights"):
        check_files(config, cached=False)
    with pytest.raises(ConfigError, match=r"encoder\.checkpoint: no bundled weights"):
        check_files(override(config, {"cache.prompts": False}))


def test_the_size_of_sampled_images_is_looked_at():
    with pytest.raises(ConfigError, match="--size: expected a multiple of 8, as 'sd' needs, got 63"):
        check_files(load_config(ALIGN), training=False, sizes={"--size": 63, "height": 64})


def test_a_checkpoint_with_all_weights_is_no_base_model(tmp_path):
    network(tmp_path / "run" / "unet")
    assert hub.is_base_model(str(tmp_path / "run"))
    (tmp_path / "run" / "longalign.safetensors").touch()
    assert not hub.is_base_model(str(tmp_path / "run"))


def test_sampling_needs_backbone_and_encoder_only():
    config = override(ALIGN, {"data": {"name": "folder", "folder": "nowhere"}, "validation": {"prompts": "no.txt"}})
    check_files(config, training=False)
    with pytest.raises(ConfigError, match=r"backbone\.checkpoint"):
        check_files(override(config, {"backbone.checkpoint": "mini/no"}), training=False)


def test_the_cache_of_the_hub_is_looked_into(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    network(repository / "snapshots" / "abc" / "unet", cross_attention_dim=9)
    network(repository / "snapshots" / "abc" / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert "width 128" in found({"backbone.checkpoint": "owner/name"})["encoder"]
    assert hub.local_file("owner/name", "vae/config.json", "abc")
    assert "not on this machine" in hub.absent("owner/name", "other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.absent("owner/other") == ""


def test_a_plugins_check_that_fails_is_named():
    class MineConfig(PartConfig):
        name: Literal["mine"] = "mine"

        def build(self, runtime):
            return lambda images, prompts: images

        def check_files(self):
            return 1 / 0

    rewards.register("mine", MineConfig)
    try:
        problems = found({**REWARD, "data": ALIGN["data"], "rewards": ["mine"]})
    finally:
        rewards.unregister("mine")
    assert problems == {"rewards.0": "check_files of 'mine' failed: ZeroDivisionError: division by zero"}


@pytest.mark.parametrize("command", ["train", "generate", "python"])
def test_no_torch_before_the_files_are_looked_at(tmp_path, command):
    config = {**ALIGN, "data": {"name": "folder", "folder": "nowhere"}, "init_from": "nowhere"}
    config["backbone"] = {"name": "sd", "checkpoint": "mini/nothing"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = {
        "train": "from longalign.cli import main; code = main(['train', 'run.yaml'])",
        "generate": "from longalign.cli import main\n"
        "code = main(['generate', '--config', 'run.yaml', '--prompt', 'a', '--output', 'out'])",
        "python": "import longalign\ntry: longalign.build_from_config('run.yaml').fit()\n"
        "except longalign.ConfigError as error: code = 2; print(error, file=sys.stderr)",
    }[command]
    text = f"import sys, time\n{run}\nassert code == 2\nassert 'torch' not in sys.modules\nprint(time.process_time())"
    environment = {**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    named = ["backbone.checkpoint: ", "init_from: ", *(["data.folder: "] if command != "generate" else [])]
    assert all(key in done.stderr for key in named)
    assert float(done.stdout.splitlines()[-1]) < 2  # 0.35 where nothing else runs


def test_what_stood_against_a_download_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def raised(kind, *, of=OSError):
        try:
            try:
                raise kind.__new__(kind)
            except Exception as error:
                raise of("long text") from error
        except Exception as error:
            return hub.why(error)

    assert "gated" in raised(errors.GatedRepoError)
    assert "no such repository" in raised(errors.RepositoryNotFoundError)
    assert "no such revision" in raised(errors.RevisionNotFoundError)
    assert "cannot be reached" in raised(errors.LocalEntryNotFoundError)
    assert "cannot be reached" in raised(ConnectionError)
    assert "files" in raised(errors.EntryNotFoundError)
    assert raised(KeyError) == "long text"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in raised(errors.LocalEntryNotFoundError)


def test_fit_checks_before_it_builds():
    with pytest.raises(ConfigError, match=r"init_from: no checkpoint in nowhere"):
        build_from_config({**ALIGN, "init_from": "nowhere"}).fit()


@pytest.mark.parametrize("source", ["mini/sd", "owner/name"])
def test_a_base_model_is_no_checkpoint_of_longalign(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    network(tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc" / "unet")
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / "main").write_text("abc")
    with pytest.raises(FileNotFoundError, match=f"'{source}' is a base model, .*--config.*--pipeline"):
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
def test_a_checkpoint_that_cannot_be_downloaded_is_named_with_the_cause(part):
    ((kind, config),) = part.items()
    with pytest.raises(ValueError, match=r"'owner/name'.*HF_HUB_OFFLINE"):
        REGISTRIES[kind].build(config, Runtime())
    with pytest.raises(FileNotFoundError, match=r"'owner/name'.*HF_HUB_OFFLINE"):
        find_checkpoint("owner/name")


def test_a_checkpoint_whose_base_model_is_gone_names_it(tmp_path):
    folder = tmp_path / "run" / "checkpoint-000001"
    folder.mkdir(parents=True)
    config = load_config({**ALIGN, "backbone": {"name": "sd", "checkpoint": "gone/away"}, "init_from": "not-needed"})
    header = json.dumps({"__metadata__": {"config": to_json(config)}}).encode()
    (folder / "longalign.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError) as error:
        load_for_sampling(folder)
    assert [path for path, _ in error.value.errors] == ["backbone.checkpoint"]
