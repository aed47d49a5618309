"""The settings and trainers that FSDP supports."""

from types import SimpleNamespace

import pytest
import torch
import worlds
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
