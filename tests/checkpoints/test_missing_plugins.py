"""Checkpoints that were trained with plugins, used where the plugins are not installed."""

import sys

import numpy as np
import pytest
import torch

from longalign import ConfigError, Model, build_from_config, load_config
from longalign.checkpoints.checkpoint import read_config, save
from longalign.checkpoints.publish import export
from longalign.cli.main import main
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_clip, tiny_sd

TRAINING = """
[longalign_rewards]
blur = fake_training:BlurConfig
[longalign_gradient_steps]
first = fake_training:FirstConfig
"""
TRAINING_MODULE = """
from typing import Literal
from longalign.gradient_steps import GradientSteps, GradientStepsConfig
from longalign.rewards import RewardConfig

class BlurConfig(RewardConfig):
    name: Literal["blur"] = "blur"
    radius: float = 1.0

    def build(self, runtime):
        return lambda images, prompts: images.mean((1, 2, 3))

class First:
    def select(self, num_steps):
        return GradientSteps((0,))

class FirstConfig(GradientStepsConfig):
    name: Literal["first"] = "first"

    def build(self, runtime):
        return First()
"""
ENCODER_MODULE = """
from typing import Literal
from longalign.encoders import ClipSegmentConfig

class MineConfig(ClipSegmentConfig):
    name: Literal["mine"] = "mine"
"""
REWARD_MODULE = """
from typing import Literal
from longalign.rewards.clip.config import ClipConfig

class LikedConfig(ClipConfig):
    name: Literal["liked"] = "liked"
"""


@pytest.fixture
def uninstall(tmp_path):
    """Function that removes an installed plugin and its modules."""

    def remove(name):
        sys.path.remove(str(tmp_path / name))
        del sys.modules[name.replace("-", "_")]

    return remove


@pytest.fixture
def checkpoint(tmp_path, install):
    """Function that saves a checkpoint of a reward run with a plugin's reward and gradient steps."""

    def write(encoder="clip-segment"):
        install("fake-training", TRAINING, version="1.2", fake_training=TRAINING_MODULE)
        base = str(tiny_sd(tmp_path / "sd"))
        run = {
            "backbone": {"name": "sd", "checkpoint": base},
            "encoder": {"name": encoder, "checkpoint": base},
            "rewards": [{"name": "blur", "radius": 2.0}],
            "trainer": {"name": "reward", "num_steps": 2, "gradient_steps": "first", "lora": {"rank": 2}},
            "data": {"name": "scenes", "size": 4},
        }
        composition = build_from_config(run, Runtime())
        composition.trainer.train()
        with torch.no_grad():
            for parameter in composition.trainer.trainable():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folder = tmp_path / "run" / "checkpoint-000003"
        save(folder, composition.config, composition.backbone, composition.encoder, 3)
        return folder

    return write


def image(checkpoint):
    """Pixels ``(h, w, 3)`` of an image of a checkpoint, in 0 to 255."""
    model = Model.from_pretrained(checkpoint, device="cpu")
    return np.asarray(model(["a fox"], seeds=0, num_steps=2)[0]).astype(int)


def test_model_samples_and_exports_without_training_plugins(checkpoint, uninstall, tmp_path, caplog):
    folder = checkpoint()
    before = image(folder)
    uninstall("fake-training")

    assert np.abs(image(folder) - before).max() <= 1
    assert "fake-training 1.2, which provided rewards.0, trainer.gradient_steps" in caplog.text

    export(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "only: `fake-training 1.2` (for `rewards.0`, `trainer.gradient_steps`)" in card
    assert "trainer `reward`" in card and "Rewards: `blur`" in card and '"size": 4' in card
    assert "radius: 2.0" in card
    assert np.abs(image(tmp_path / "out") - before).max() <= 1


def test_load_config_names_missing_plugins_of_checkpoint(checkpoint, uninstall, capsys):
    folder = checkpoint()
    uninstall("fake-training")
    with pytest.raises(ConfigError, match=r"fake-training 1\.2, which provided rewards\.0, trainer\.gradient_steps"):
        load_config(folder)
    assert main(["describe", str(folder)]) != 0
    assert "fake-training 1.2" in capsys.readouterr().err


def test_model_names_missing_plugin_of_encoder(install, checkpoint, uninstall):
    install("fake-encoder", "[longalign_encoders]\nmine = fake_encoder:MineConfig\n", fake_encoder=ENCODER_MODULE)
    folder = checkpoint(encoder="mine")
    export(folder, folder.parent / "out")
    card = (folder.parent / "out" / "README.md").read_text()
    assert "longalign: `fake-encoder 1.0` (for `encoder`)." in card
    uninstall("fake-encoder")
    for source in (folder, folder.parent / "out"):
        with pytest.raises(ConfigError, match=r"fake-encoder 1\.0, which provided encoder;"):
            Model.from_pretrained(source, device="cpu")


def test_export_names_missing_plugin_of_trained_reward(install, uninstall, tmp_path):
    install("fake-liked", "[longalign_rewards]\nliked = fake_liked:LikedConfig\n", fake_liked=REWARD_MODULE)
    config = load_config(
        {
            "backbone": None,
            "encoder": None,
            "rewards": [{"name": "liked", "checkpoint": str(tiny_clip(tmp_path / "clip"))}],
            "trainer": "denscore",
            "data": {"name": "scene-pairs", "size": 4},
        }
    )
    folder = tmp_path / "run" / "checkpoint-000003"
    save(folder, config, None, None, 3)
    uninstall("fake-liked")
    with pytest.raises(ConfigError, match=r"fake-liked 1\.0, which provided rewards\.0;"):
        read_config(folder)
