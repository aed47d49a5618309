"""From configs to parts, on parts that only remember how they were built."""

from typing import ClassVar, Literal

import pytest
import torch
from tiny import tiny_sd

from longalign import checkpoint
from longalign.backbones.base import Backbone
from longalign.backbones.configs import LoraConfig
from longalign.compose import Composition, build_from_config
from longalign.config import load_config, override
from longalign.data.base import Data
from longalign.encoders.base import Encoder
from longalign.errors import ConfigError
from longalign.registry import PartConfig, backbones, data, encoders, rewards, trainers
from longalign.rewards.base import Reward
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.trainers.base import Trainer
from longalign.trainers.configs import TrainerConfig

BUILT: list[str] = []


class RecordedConfig(PartConfig):
    name: Literal["recorded"] = "recorded"
    label: str = ""
    part: ClassVar[str] = ""

    def build(self, runtime):
        BUILT.append(self.part)
        return made(self.part, label=self.label, runtime=runtime)


class RecordedTrainerConfig(TrainerConfig):
    uses_rewards: ClassVar[bool] = True

    name: Literal["recorded"] = "recorded"

    def build(self, runtime, *, backbone, encoder, rewards):
        BUILT.append("trainer")
        return made("trainer", given=(backbone, encoder, rewards))


def made(part, **remembered):
    """A part that does nothing."""
    base = {"backbone": Backbone, "encoder": Encoder, "trainer": Trainer, "data": Data}[part]
    init = object.__init__ if base is Data else torch.nn.Module.__init__
    thing = type(f"Recorded{base.__name__}", (base,), {"__init__": init, **remembered})
    return thing()


@pytest.fixture(autouse=True)
def recorded():
    BUILT.clear()
    kinds = {backbones: "backbone", encoders: "encoder", data: "data"}
    for registry, part in kinds.items():
        registry.register("recorded", type(f"{part}Config", (RecordedConfig,), {"part": part}))
    trainers.register("recorded", RecordedTrainerConfig)
    rewards.register("first", lambda images, prompts: images.mean((1, 2, 3)))
    rewards.register("second", lambda images, prompts: -images.mean((1, 2, 3)))
    yield
    for registry in (*kinds, trainers):
        registry.unregister("recorded")
    rewards.unregister("first")
    rewards.unregister("second")


CONFIG = {"backbone": "recorded", "encoder": "recorded", "trainer": "recorded", "data": "recorded"}


def test_parts_are_built_when_asked_for_and_once():
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


def test_the_trainer_gets_the_same_parts_and_all_rewards_in_order():
    composition = build_from_config({**CONFIG, "rewards": ["second", "first"]}, Runtime())
    backbone, encoder, scored = composition.trainer.given
    assert backbone is composition.backbone
    assert encoder is composition.encoder
    assert scored is composition.rewards
    assert all(isinstance(reward, Reward) for reward in scored)
    assert [reward.score(torch.ones(1, 3, 2, 2), ["p"]).item() for reward in scored] == [-1.0, 1.0]
    assert build_from_config(CONFIG, Runtime()).trainer.given[2] == []


def test_a_fault_anywhere_is_found_before_any_part_is_built():
    with pytest.raises(ConfigError, match=r"data\.lable"):
        build_from_config({**CONFIG, "data": {"name": "recorded", "lable": "x"}})
    assert BUILT == []


def test_the_runtime_follows_the_precision_and_can_be_set_until_a_part_is_built():
    composition = build_from_config({**CONFIG, "loop": {"precision": "bf16"}})
    assert composition.runtime.dtype == "bfloat16"
    assert composition.runtime.device == ("cuda" if torch.cuda.is_available() else "cpu")
    composition.runtime = Runtime("meta")
    assert composition.encoder.runtime.device == "meta"
    with pytest.raises(ValueError, match="already parts on it: encoder"):
        composition.runtime = Runtime("cpu")


def test_a_run_without_trainer_says_what_is_missing():
    composition = build_from_config({"backbone": "recorded", "encoder": "recorded"}, Runtime())
    with pytest.raises(ConfigError, match="trainer: this run has no trainer"):
        composition.fit()
    with pytest.raises(ConfigError, match="data: this run has no data"):
        _ = composition.data
    assert BUILT == []


def test_a_run_and_its_checkpoint_file_are_composed_alike(tmp_path):
    config = load_config(CONFIG)
    assert Composition(config).config == build_from_config(config).config == config


def test_init_from_puts_the_checkpoint_under_the_parts(tmp_path, monkeypatch):
    folder = str(tiny_sd(tmp_path / "sd"))
    source = {
        "backbone": {"name": "sd", "checkpoint": folder},
        "encoder": {"name": "clip-truncate", "checkpoint": folder},
    }
    first = build_from_config(source, Runtime())
    parameters = first.backbone.add_lora(LoraConfig(rank=2, dropout=0.0), "align")
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(0.1)
    saved = tmp_path / "run" / "checkpoint-000005"
    checkpoint.save(saved, first.config, first.backbone, first.encoder, 5)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: str(saved / file))
    for place in (str(tmp_path / "run"), "owner/name"):
        second = build_from_config(override(source, {"init_from": place}), Runtime())
        assert second.backbone.lora_names == ["align"]
        for mine, theirs in zip(first.backbone.lora_state(), second.backbone.lora_state(), strict=True):
            assert all(torch.equal(mine.state[key], theirs.state[key]) for key in mine.state)


def test_init_from_a_checkpoint_that_is_not_there_is_found_before_weights_are_loaded(tmp_path):
    composition = build_from_config({**CONFIG, "init_from": str(tmp_path)}, Runtime())
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        _ = composition.encoder
    assert BUILT == []


def test_bundled_checkpoints_resolve_and_local_ones_win(tmp_path, monkeypatch):
    assert resolve_checkpoint("some/hub-id") == "some/hub-id"
    with pytest.raises(ValueError, match="no bundled weights 'mini/nothing'; expected 'mini' or 'mini/<folder>'"):
        resolve_checkpoint("mini/nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini" / "nothing").mkdir(parents=True)
    assert resolve_checkpoint("mini/nothing") == "mini/nothing"


def test_a_runtime_of_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, not 'half'"):
        Runtime("cpu", "half")
