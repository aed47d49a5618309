"""FSDP with two processes trains as one process does with the same global batch."""

import json
from types import SimpleNamespace

import launched
import numpy as np
import pytest
import torch
import worlds
from launched import lines
from PIL import Image
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from longalign.config.run import load_config
from longalign.loop.fsdp import check_fsdp_config, prepare_fsdp
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone
from longalign.trainers.align.config import AlignConfig
from longalign.trainers.align.trainer import AlignTrainer
from longalign.trainers.base import Trainer
from longalign.trainers.lcm.config import LCMConfig
from longalign.trainers.lcm.trainer import LCMTrainer

WRAP = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
WRAP += ["--fsdp_transformer_layer_cls_to_wrap", "BasicTransformerBlock,ResnetBlock2D"]
SETTINGS = ["--use_fsdp", "--fsdp_version", "2", *WRAP, "--fsdp_cpu_ram_efficient_loading", "false"]
KINDS = ("align", "reward", "full", "kl", "lcm")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Output folders of the runs with two processes and with one."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    launched.launch(two, *SETTINGS)
    with launched.registered():
        launched.train(one, configs=launched.fsdp_configs)
        launched.train(one, configs=launched.bf16_configs)
    return two, one


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_equal_one_process(outputs, kind):
    checkpoints = launched.assert_equal_runs(*(folder / kind for folder in outputs))
    assert all(len(weights) > 2 for weights in checkpoints.values())


@pytest.mark.processes
def test_bf16_losses_are_close_to_one_process(outputs):
    two, one = ([line["loss"] for line in lines(folder / "half")] for folder in outputs)
    assert two == pytest.approx(one, rel=0.02) and len(one) == 2


def tensors(value, name=""):
    """All tensors of a nested value, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, child in children for k, v in tensors(child, f"{name}.{key}").items()}


@pytest.mark.processes
def test_resume_state_contains_full_tensors(outputs):
    files = (folder / "align" / "checkpoint-000004" / "resume" / "shared.pt" for folder in outputs)
    ours, theirs = (torch.load(file, weights_only=True) for file in files)
    ours["optimizer"], theirs["optimizer"] = ours["optimizer"]["state"], theirs["optimizer"]["state"]
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys() and {".ema.shadow_params.0", ".optimizer.0.exp_avg"} <= ours.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.processes
def test_processes_hold_one_shard_and_call_denoiser_equally_often(outputs):
    first, second = (json.loads((outputs[0] / f"results-{rank}.json").read_text()) for rank in range(2))
    for kind in KINDS:
        assert first[kind]["calls"] == second[kind]["calls"] > 0
        assert first[kind]["shard"] + second[kind]["shard"] == pytest.approx(1)
        assert 0.4 < first[kind]["shard"] < 0.6


@pytest.mark.processes
def test_monitor_images_equal_one_process(outputs):
    ours, theirs = (sorted((folder / "align" / "monitor").rglob("*.png")) for folder in outputs)
    assert sorted({p.parent.name for p in ours}) == ["000000", "000002", "000004"]
    assert [(p.parent.name, p.name) for p in ours] == [(p.parent.name, p.name) for p in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


PLUGIN = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False}
PLUGIN |= {"cpu_offload": OffloadPolicy(), "ignored_modules": None}


@pytest.mark.parametrize(
    ("changed", "loop", "message"),
    [
        ({"fsdp_version": 1}, {}, "fsdp_version 1.* 2"),
        ({"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading.*false"),
        ({"activation_checkpointing": True}, {}, r"fsdp_activation_checkpointing.*loop\.gradient_checkpointing"),
        ({"cpu_offload": CPUOffloadPolicy()}, {}, "fsdp_offload_params.*false"),
        ({"ignored_modules": "mid_block"}, {}, "fsdp_ignored_modules"),
        ({}, {"compile": True}, r"loop\.compile.*false"),
        ({}, {"channels_last": True}, r"loop\.channels_last.*false"),
        ({}, {"precision": "fp16"}, r"loop\.precision fp16.*bf16 or no"),
    ],
)
def test_check_fsdp_config_rejects_unsupported_settings(world, tmp_path, changed, loop, message):
    config = load_config(world.align_config(tmp_path, **loop))
    with pytest.raises(ValueError, match=message):
        check_fsdp_config(SimpleNamespace(**{**PLUGIN, **changed}), None, config)


def test_check_fsdp_config_accepts_defaults_but_no_parallelism(world, tmp_path):
    plugin, config = SimpleNamespace(**PLUGIN), load_config(world.align_config(tmp_path))
    check_fsdp_config(plugin, None, config)
    with pytest.raises(ValueError, match="parallelism_config"):
        check_fsdp_config(plugin, object(), config)


def test_prepare_fsdp_rejects_bf16_for_flows():
    backbone = tiny_backbone()
    backbone.prediction = "flow"
    trainer = AlignTrainer.from_config(
        AlignConfig(lora=worlds.LORA), Runtime(), backbone=backbone, encoder=worlds.ToyEncoder()
    )
    with pytest.raises(ValueError, match=r"bf16.*flow.*loop\.precision.*backbone\.dtype"):
        prepare_fsdp(SimpleNamespace(mixed_precision="bf16"), trainer, torch.optim.AdamW)


def test_fsdp_module_rejects_unsupported_trainers():
    def trainer(**keys):
        config = LCMConfig(lora=worlds.LORA, **keys)
        return LCMTrainer.from_config(config, Runtime(), backbone=tiny_backbone(), encoder=worlds.ToyEncoder())

    lcm = trainer()
    assert lcm.fsdp_module("bf16") is lcm.backbone.denoiser
    with pytest.raises(ValueError, match=r"'lcm'.*trainer\.ema_decay.*null"):
        trainer(ema_decay=0.9).fsdp_module("no")
    with pytest.raises(ValueError, match=r"denoiser.*\bTrainer\b"):
        Trainer().fsdp_module("no")
    lcm.backbone.denoiser.requires_grad_(False)
    with pytest.raises(ValueError, match="denoiser has no trainable parameters"):
        lcm.fsdp_module("no")
