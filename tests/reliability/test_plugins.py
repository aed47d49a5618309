"""Faulty plugins, as distributions installed for one test: errors name the plugin, other parts keep working.

`pytest tests/reliability/test_plugins.py -m ""` runs all cases; the test suite runs some of each kind.
"""

import re
import sys

import pytest
import torch

import longalign
from longalign.backbones.config import BackboneConfig
from longalign.config.describe import parts_table
from longalign.data.base import Data
from longalign.data.config import DataConfig
from longalign.encoders.base import Conditioning, Encoder
from longalign.encoders.config import EncoderConfig
from longalign.registry import backbones, data, encoders, rewards
from longalign.rewards.config import RewardConfig
from longalign.rewards.guard import NonFiniteReward
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone

P, T = "PartConfig", "TrainerConfig"
HEAD = """
from typing import ClassVar, Literal

from longalign.backbones.config import BackboneConfig
from longalign.data.config import DataConfig
from longalign.encoders.config import EncoderConfig
from longalign.registry import PartConfig
from longalign.rewards.config import RewardConfig
from longalign.trainers.config import TrainerConfig

class FaultyConfig({base}):
    name: Literal["faulty"] = "faulty"
"""


class Letters(Encoder):
    dim = 8

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(32, 8).requires_grad_(False)

    def encode(self, prompts):
        return Conditioning(self.table(torch.tensor([[ord(c) % 32 for c in p[:4].ljust(4)] for p in prompts])))


class Squares(Data):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"prompt": str(index), "image": torch.full((3, 8, 8), index / 10)}


GOOD = {backbones: lambda: tiny_backbone("epsilon"), encoders: Letters, data: Squares}
BASES = {"backbones": BackboneConfig, "encoders": EncoderConfig, "data": DataConfig, "rewards": RewardConfig}


@pytest.fixture(autouse=True)
def good():
    def part(make, base):
        return type("GoodConfig", (base,), {"build": lambda self, runtime: make(), "__module__": __name__})

    for registry, make in GOOD.items():
        registry.register("good", part(make, BASES[registry.kind]))
    yield
    for registry in GOOD:
        registry.unregister("good")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Function that installs a distribution with one part named ``faulty``, or with the given entry points."""

    def install(kind, text, base=P, entries=None):
        info = tmp_path / "fake_faulty-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-faulty\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            entries or f"[longalign_{kind}]\nfaulty = fake_faulty:FaultyConfig\n", encoding="utf-8"
        )
        indented = "".join(f"    {line}\n" for line in text.strip().splitlines())
        base = BASES[kind].__name__ if base == P else base
        (tmp_path / "fake_faulty.py").write_text(HEAD.format(base=base) + indented)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("fake_faulty", None)


def fit(tmp_path, **changes):
    config = {
        "backbone": "good",
        "encoder": "good",
        "trainer": {"name": "align", "lora": {"rank": 2}},
        "data": "good",
        "output": str(tmp_path / "out"),
        "loop": {"steps": 1, "batch_size": 2},
        **changes,
    }
    return longalign.fit(config, device="cpu")


REWARD = {"trainer": {"name": "reward", "lora": {"rank": 2}, "num_steps": 2, "guidance": 1.0, "gradient_steps": "all"}}
BUILD = "def build(self, runtime):\n    "
TRAINER = "def build(self, runtime, *, backbone, encoder):\n    "
SCORES = BUILD + "return lambda images, prompts: {}"
FAKE = r"fake[-_]faulty"


def every_third(*cases):
    """The cases; every third one runs in the test suite, the others are marked ``reliability``."""
    return [case if i % 3 == 0 else pytest.param(*case, marks=pytest.mark.reliability) for i, case in enumerate(cases)]


PARTS = every_third(
    (
        "encoders",
        BUILD + "return 3",
        P,
        rf"'faulty' .*{FAKE} 1\.0.*got int",
    ),
    (
        "encoders",
        BUILD + "return lambda prompts: prompts",
        P,
        r"longalign\.encoders\.base\.Encoder, got function",
    ),
    ("encoders", "def build(self):\n    return 3", P, rf"{FAKE} 1\.0 .*build .*\(self, runtime\)"),
    (
        "encoders",
        BUILD + "return [][0]",
        P,
        rf"'faulty' .*{FAKE} 1\.0.*IndexError",
    ),
    ("encoders", BUILD + "import nothing_at_all", P, "nothing_at_all"),
    (
        "encoders",
        f"{BUILD}from longalign.encoders.base import Encoder\n    import torch\n"
        "    class Tensors(Encoder):\n        dim = 8\n"
        "        def encode(self, prompts):\n            return torch.zeros(len(prompts), 4, 8)\n    return Tensors()",
        P,
        rf"{FAKE}\.Tensors .*Conditioning.*Tensor",
    ),
    ("data", BUILD + "return [{'prompt': 'a'}]", P, r"longalign\.data\.base\.Data .*, got list"),
    ("backbones", BUILD + "return None", P, r"longalign\.backbones\.base\.Backbone, got NoneType"),
    ("trainers", BUILD + "return None", T, "FaultyConfig.build .*'backbone'"),
    (
        "trainers",
        TRAINER + "return backbone",
        T,
        r"longalign\.trainers\.base\.Trainer, got \w*Backbone",
    ),
    (
        "trainers",
        f"{TRAINER}from longalign.trainers.diffusion import DiffusionTrainer\n"
        "    class Lossless(DiffusionTrainer):\n        def loss(self, batch):\n            return {'score': 1}\n"
        "    backbone.train_all()\n    return Lossless(backbone, encoder, False)",
        T,
        r"Lossless\.loss .*'_loss'.*got score",
    ),
    (
        "trainers",
        "def check_run(self, run):\n    return run.nothing\n" + TRAINER + "return None",
        T,
        rf"check_run of 'faulty' \({FAKE}\.FaultyConfig\) .*AttributeError",
    ),
    (
        "trainers",
        "def check_run(self, run):\n    return ['wrong']\n" + TRAINER + "return None",
        T,
        r"check_run of 'faulty' .*ValueError",
    ),
    (
        "data",
        "def check_files(self):\n    return [3]\n" + BUILD + "return []",
        P,
        "data: check_files of 'faulty'",
    ),
    (
        "data",
        "def widths(self):\n    raise OSError('x')\n" + BUILD + "return 1",
        P,
        r"longalign\.data\.base\.Data .*, got int",
    ),
    (
        "encoders",
        "def widths(self):\n    return 3\n" + BUILD + "return 1",
        P,
        r"encoder: .*widths.*'faulty'.*TypeError",
    ),
)


@pytest.mark.parametrize(("kind", "text", "base", "message"), PARTS)
def test_fit_names_faulty_part(plugin, tmp_path, kind, text, base, message):
    plugin(kind, text, base)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **{kind if kind == "data" else kind.removesuffix("s"): "faulty"})
    assert not list((tmp_path / "out").glob("checkpoint-*"))


REWARDS = every_third(
    (SCORES.format("images.mean((1, 2, 3)).detach()"), "'faulty' .*gradient"),
    (SCORES.format("(images.mean((1, 2, 3)) * 9).long()"), r"'faulty' .*torch\.int64"),
    (SCORES.format("images.mean()"), r"'faulty' .*\b2 images.*shape"),
    (SCORES.format("images.mean((1, 2, 3))[:, None]"), r"'faulty' .*shape \(2, 1\)"),
    (SCORES.format("0.5"), r"'faulty' .*tensor.*\bfloat\b"),
    (SCORES.format("(images.mean((1, 2, 3)), 1)"), r"'faulty' .*tensor.*\btuple\b"),
    (SCORES.format("None"), r"'faulty' .*tensor.*\bNoneType\b"),
    (SCORES.format("images.mul_(2).mean((1, 2, 3))"), r"'faulty' .*(writ|modif|change)\w* .*images"),
    (SCORES.format("images.mean((1, 2, 3)) / 0"), "'faulty' .*finite"),
    (SCORES.format("images.mean((1, 2, 3)) * float('nan')"), "'faulty' .*finite"),
    ("differentiable: ClassVar[bool] = False\n" + SCORES.format("images"), r"rewards\.0: 'faulty' .*gradient"),
    (BUILD + "return lambda images: images", r"'faulty' .*\(images, prompts\)"),
    (BUILD + "return 3", r"longalign\.rewards\.base\.Reward, got int"),
)


@pytest.mark.parametrize(("text", "message"), REWARDS)
def test_fit_names_faulty_reward(plugin, tmp_path, text, message):
    plugin("rewards", text, "RewardConfig")
    with pytest.raises(ValueError, match=message) as error:
        fit(tmp_path, **REWARD, rewards=["faulty"])
    if isinstance(error.value, NonFiniteReward):
        assert (error.value.reward, error.value.prompt in "0123") == ("faulty", True)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SCORES.format("images"), "'faulty' .*embeddings"),
        ("embeds: ClassVar[bool] = True\n" + SCORES.format("images"), "EmbeddingReward"),
    ],
)
def test_reweighted_rejects_reward_without_embeddings(plugin, tmp_path, text, message):
    plugin("rewards", text, "RewardConfig")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **REWARD, rewards=[{"name": "reweighted", "inner": "faulty"}])


def test_fit_rejects_rewards_for_trainer_without_rewards(plugin, tmp_path):
    plugin("trainers", TRAINER + "return None", "TrainerConfig")
    rewards.register("red", lambda images, prompts: images[:, 0].mean((1, 2)))
    try:
        with pytest.raises(ValueError, match=r"rewards: 'faulty' .*no rewards, got 1"):
            fit(tmp_path, trainer="faulty", rewards=["red"])
    finally:
        rewards.unregister("red")


@pytest.mark.parametrize(
    ("module", "entries", "message"),
    every_third(
        ("import nothing_at_all", None, "ModuleNotFoundError"),
        ("x = (", None, "SyntaxError"),
        ("import sys; sys.exit(3)", None, "SystemExit: 3"),
        ("raise MemoryError", None, "MemoryError"),
        ("def f(): f()\nf()", None, "RecursionError"),
        ("", "[longalign_rewards]\nfaulty = fake_faulty:Nothing\n", "AttributeError: .*'Nothing'"),
        ("", "[longalign_rewards]\nfaulty = fake_faulty\n", "RewardConfig class.*got <module 'fake_faulty'"),
        ("", "[longalign_rewards]\nfaulty\n", "entry points of fake-faulty"),
        ("", "[longalign_reward]\nfaulty = fake_faulty:FaultyConfig\n", "'longalign_reward'.*'longalign_rewards'"),
        ("", "[longalign_rewards]\nclip = fake_faulty:FaultyConfig\n", "'clip' of kind 'rewards' .* longalign "),
        ("", "[longalign_rewards]\nFaulty = fake_faulty:FaultyConfig\n", "'Faulty' must be in kebab case"),
        ("", "[longalign_rewards]\nother = fake_faulty:FaultyConfig\n", "FaultyConfig .*'faulty'.*'other'"),
    ),
)
def test_parts_table_lists_broken_plugin(plugin, tmp_path, module, entries, message):
    plugin("rewards", SCORES.format("images"), entries=entries)
    with (tmp_path / "fake_faulty.py").open("a") as file:
        file.write(module)
    problems = parts_table(targets=True)[1]
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert "fake-faulty 1.0" in problems[0]
    assert encoders.build("good", Runtime()).dim == 8
