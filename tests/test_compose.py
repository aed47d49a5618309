"""Composition of runs from configs, with stub parts that record how they were built."""

import re
from typing import Any, ClassVar, Literal

import pytest
import torch

from longalign.backbones.base import Backbone
from longalign.backbones.config import BackboneConfig, LoraConfig
from longalign.checkpoints import checkpoint
from longalign.compose import Composition, build_from_config
from longalign.config.changes import override
from longalign.config.run import load_config
from longalign.data.base import Data
from longalign.data.config import DataConfig
from longalign.encoders.base import Encoder
from longalign.encoders.config import EncoderConfig
from longalign.errors import ConfigError
from longalign.loop.fit import fit
from longalign.registry import PartConfig, backbones, data, encoders, rewards, trainers
from longalign.rewards.base import Reward
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.testing.tiny import tiny_sd
from longalign.trainers.base import Trainer
from longalign.trainers.config import TrainerConfig

BUILT: list[str] = []
BASES = {"backbone": BackboneConfig, "encoder": EncoderConfig, "data": DataConfig}


class RecordedConfig(PartConfig):
    name: Literal["recorded"] = "recorded"
    label: str = ""
    part: ClassVar[str] = ""

    def build(self, runtime):
        BUILT.append(self.part)
        return make_part(self.part, label=self.label, runtime=runtime)


class RecordedTrainerConfig(TrainerConfig):
    uses_rewards: ClassVar[bool] = True

    name: Literal["recorded"] = "recorded"

    def build(self, runtime, *, backbone, encoder, rewards):
        BUILT.append("trainer")
        return make_part("trainer", received=(backbone, encoder, rewards))


def make_part(part, **attributes):
    """A part that does nothing."""
    base = {"backbone": Backbone, "encoder": Encoder, "trainer": Trainer, "data": Data}[part]
    init = object.__init__ if base is Data else torch.nn.Module.__init__
    part_class = type(f"Recorded{base.__name__}", (base,), {"__init__": init, **attributes})
    return part_class()


@pytest.fixture(autouse=True)
def recorded():
    BUILT.clear()
    kinds = {backbones: "backbone", encoders: "encoder", data: "data"}
    for registry, part in kinds.items():
        registry.register("recorded", type(f"{part}Config", (RecordedConfig, BASES[part]), {"part": part}))
    trainers.register("recorded", RecordedTrainerConfig)
    rewards.register("bright", lambda images, prompts: images.mean((1, 2, 3)))
    rewards.register("dark", lambda images, prompts: -images.mean((1, 2, 3)))
    yield
    for registry in (*kinds, trainers):
        registry.unregister("recorded")
    rewards.unregister("bright")
    rewards.unregister("dark")


CONFIG = {"backbone": "recorded", "encoder": "recorded", "trainer": "recorded", "data": "recorded"}


def test_composition_builds_parts_lazily_and_once():
    composition = build_from_config(CONFIG, Runtime())
    assert BUILT == []
    assert composition.encoder is composition.encoder
    assert BUILT == ["encoder"]
    assert composition.trainer is composition.trainer
    assert BUILT == ["encoder", "backbone", "trainer"]
    assert composition.data.label == ""
    assert repr(composition) == (
        "Composition(backbone=recorded, encoder=recorded, trainer=recorded, data=recorded; "
        "built: encoder, backbone, rewards, trainer, data)"
    )


def test_composition_trainer_gets_same_parts_and_ordered_rewards():
    composition = build_from_config({**CONFIG, "rewards": ["dark", "bright"]}, Runtime())
    trainer: Any = composition.trainer
    backbone, encoder, given_rewards = trainer.received
    assert backbone is composition.backbone
    assert encoder is composition.encoder
    assert given_rewards is composition.rewards
    assert all(isinstance(reward, Reward) for reward in given_rewards)
    assert [reward.score(torch.ones(1, 3, 2, 2), ["p"]).item() for reward in given_rewards] == [-1.0, 1.0]
    assert build_from_config(CONFIG, Runtime()).trainer.received[2] == []


def test_build_from_config_validates_before_building():
    with pytest.raises(ConfigError, match=r"data\.lable"):
        build_from_config({**CONFIG, "data": {"name": "recorded", "lable": "x"}})
    assert BUILT == []


def test_composition_passes_its_runtime_which_cannot_change():
    composition = build_from_config({**CONFIG, "loop": {"precision": "bf16"}})
    assert composition.runtime.dtype == "bfloat16"
    assert composition.runtime.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert build_from_config(CONFIG, Runtime("meta")).encoder.runtime.device == "meta"
    with pytest.raises(AttributeError):
        composition.runtime = Runtime("cpu")


def test_composition_missing_trainer_or_data_raises():
    composition = build_from_config({"backbone": "recorded", "encoder": "recorded"}, Runtime())
    with pytest.raises(ConfigError, match=r"trainer: .*no trainer.*'trainer'"):
        _ = composition.trainer
    with pytest.raises(ConfigError, match=r"trainer: .*no trainer.*'trainer'"):
        fit(composition.config)
    with pytest.raises(ConfigError, match=r"data: .*no data.*'data'"):
        _ = composition.data
    assert BUILT == []


def test_build_from_config_accepts_run_config(tmp_path):
    config = load_config(CONFIG)
    assert Composition(config, Runtime()).config == build_from_config(config).config == config


def test_init_from_loads_checkpoint_weights(tmp_path, monkeypatch):
    folder = str(tiny_sd(tmp_path / "sd"))
    source = {
        "backbone": {"name": "sd", "checkpoint": folder},
        "encoder": {"name": "clip-truncate", "checkpoint": folder},
    }
    original = build_from_config(source, Runtime())
    parameters = original.backbone.add_lora(LoraConfig(rank=2, dropout=0.0), "align")
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(0.1)
    saved = tmp_path / "run" / "checkpoint-000005"
    checkpoint.save(saved, original.config, original.backbone, original.encoder, 5)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: str(saved / file))
    for checkpoint_name in (str(tmp_path / "run"), "owner/name"):
        loaded = build_from_config(override(source, {"init_from": checkpoint_name}), Runtime())
        assert loaded.backbone.lora_names == ["align"]
        for expected, lora in zip(original.backbone.lora_state(), loaded.backbone.lora_state(), strict=True):
            assert all(torch.equal(expected.state[key], lora.state[key]) for key in expected.state)


def test_init_from_missing_checkpoint_raises_before_building(tmp_path):
    composition = build_from_config({**CONFIG, "init_from": str(tmp_path)}, Runtime())
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        _ = composition.encoder
    assert BUILT == []


def test_resolve_checkpoint_prefers_local_over_bundled(tmp_path, monkeypatch):
    assert resolve_checkpoint("some/hub-id") == "some/hub-id"
    with pytest.raises(ValueError, match=r"'mini/nothing'.*'mini'.*'mini/<folder>'"):
        resolve_checkpoint("mini/nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini" / "nothing").mkdir(parents=True)
    assert resolve_checkpoint("mini/nothing") == "mini/nothing"


def test_runtime_unknown_dtype_raises():
    with pytest.raises(ValueError, match=r"dtype.*float32, bfloat16, float16.*'half'"):
        Runtime("cpu", "half")
