"""Two processes train as one process does with the same global batch, with DDP and with FSDP."""

import json
from subprocess import CompletedProcess

import launched
import numpy as np
import pytest
import torch
from launched import lines
from PIL import Image
from safetensors.torch import load_file

from longalign.testing.tiny import tiny_clip

pytestmark = pytest.mark.processes

WRAP = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
WRAP += ["--fsdp_transformer_layer_cls_to_wrap", "BasicTransformerBlock,ResnetBlock2D"]
SETTINGS = ["--use_fsdp", "--fsdp_version", "2", *WRAP, "--fsdp_cpu_ram_efficient_loading", "false"]
SHARDED = ("align", "short-reward", "full", "kl", "lcm")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Output folders of the runs by method: ``ddp`` and ``fsdp`` with two processes, and ``one``."""
    folder = tmp_path_factory.mktemp("processes")
    folders = {name: folder / name for name in ("ddp", "fsdp", "one")}
    for name in ("ddp", "one"):
        tiny_clip(folders[name] / "clip", width=8)
    launched.launch(folder, *SETTINGS)
    with launched.registered():
        launched.train(folders["one"], configs=launched.all_configs)
    return folders


def test_launch_after_a_crash_starts_from_the_same_files(tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []
    (folder / "clip").mkdir(parents=True)

    def start(command, **_):
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / "output").touch()
        crashed = len(seen) == 1
        return CompletedProcess(command, int(crashed), stderr="Signal 11 (SIGSEGV)" if crashed else "")

    monkeypatch.setattr(launched.subprocess, "run", start)
    with pytest.warns(UserWarning, match="SIGSEGV"):
        launched.launch(folder)
    assert seen == [["clip"], ["clip"]]


def results(folder):
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["align", "reward", "lcm", "denscore"])
def test_losses_and_weights_equal_one_process(outputs, kind):
    checkpoints = launched.assert_equal_runs(outputs["ddp"] / kind, outputs["one"] / kind)
    long = kind in ("align", "reward")
    assert set(checkpoints) == ({"checkpoint-000002", "checkpoint-000004"} if long else {"checkpoint-000002"})
    if long:
        assert all(any(k.startswith("encoder.") for k in weights) for weights in checkpoints.values())


def test_preference_model_equals_one_process(outputs):
    start = load_file(outputs["one"] / "clip" / "model.safetensors")
    two, one = (
        load_file(outputs[name] / "denscore" / "checkpoint-000002" / "reward" / "model.safetensors")
        for name in ("ddp", "one")
    )
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)


def test_common_direction_spans_all_processes(outputs):
    two, one = (lines(outputs[name] / "reward") for name in ("ddp", "one"))
    assert {"0/eta", "1/eta", "0/text_relevant", "pretraining_loss"} <= two[0].keys()
    assert [line["1/eta"] for line in two] == pytest.approx([line["1/eta"] for line in one], rel=1e-5)


def test_gradients_are_exchanged_once_per_step(outputs):
    first = results(outputs["ddp"])[0]
    for kind, steps in (("first_half", 2), ("align", 2), ("reward", 4)):
        assert first[kind]["modules"] == 2
        assert first[kind]["exchanged"] == steps * first[kind]["modules"]
    assert (first["denscore"]["modules"], first["denscore"]["exchanged"]) == (1, 2)


def test_seeds_differ_by_process_and_only_main_process_writes(outputs):
    folder = outputs["ddp"]
    assert [result["reward"]["seed"] for result in results(folder)] == [0, 1]
    assert [line["step"] for line in lines(folder / "align")] == [0, 1, 2, 2, 3, 4, 4]
    assert [line["step"] for line in lines(folder / "align") if "monitor/red" in line] == [0, 2, 4]
    assert [p.name for p in sorted((folder / "align" / "monitor").iterdir())] == ["000000", "000002", "000004"]
    resume = folder / "align" / "checkpoint-000004" / "resume"
    assert sorted(p.name for p in resume.iterdir()) == ["process-0.pt", "process-1.pt", "shared.pt"]


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_losses_and_weights_equal_one_process(outputs, kind):
    checkpoints = launched.assert_equal_runs(outputs["fsdp"] / kind, outputs["one"] / kind)
    assert all(len(weights) > 2 for weights in checkpoints.values())


def test_sharded_bf16_losses_are_close_to_one_process(outputs):
    two, one = ([line["loss"] for line in lines(outputs[name] / "half")] for name in ("fsdp", "one"))
    assert two == pytest.approx(one, rel=0.02) and len(one) == 2


def tensors(value, name=""):
    """All tensors of a nested value, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, child in children for k, v in tensors(child, f"{name}.{key}").items()}


def test_sharded_resume_state_contains_full_tensors(outputs):
    files = (outputs[name] / "align" / "checkpoint-000004" / "resume" / "shared.pt" for name in ("fsdp", "one"))
    ours, theirs = (torch.load(file, weights_only=True) for file in files)
    ours["optimizer"], theirs["optimizer"] = ours["optimizer"]["state"], theirs["optimizer"]["state"]
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys() and {".ema.shadow_params.0", ".optimizer.0.exp_avg"} <= ours.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


def test_processes_hold_one_shard_and_call_denoiser_equally_often(outputs):
    first, second = results(outputs["fsdp"])
    for kind in SHARDED:
        assert first[kind]["calls"] == second[kind]["calls"] > 0
        assert first[kind]["shard"] + second[kind]["shard"] == pytest.approx(1)
        assert 0.4 < first[kind]["shard"] < 0.6


def test_sharded_monitor_images_equal_one_process(outputs):
    ours, theirs = (sorted((outputs[name] / "align" / "monitor").rglob("*.png")) for name in ("fsdp", "one"))
    assert sorted({p.parent.name for p in ours}) == ["000000", "000002", "000004"]
    assert [(p.parent.name, p.name) for p in ours] == [(p.parent.name, p.name) for p in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)
