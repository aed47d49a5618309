"""A tiny encoder with an adapter, tiny data, a reward, and configs for the trainers' tests."""

import torch
from torch import nn

from longalign.backbones.config import BackboneConfig, LoraConfig
from longalign.config.run import load_config
from longalign.data.base import Data
from longalign.data.config import DataConfig
from longalign.encoders.base import Conditioning, Encoder
from longalign.encoders.config import EncoderConfig
from longalign.loop.run import Run
from longalign.registry import backbones, data, encoders, rewards
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone

LORA = LoraConfig(rank=2, dropout=0.1)


class ToyEncoder(Encoder):
    """Embeds a prompt's first four letters with a frozen table and an adapter with dropout."""

    dim = 8

    def __init__(self, with_adapter=True, dropout=0.1):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(32, 8, generator=generator), freeze=True)
        self.adapter = nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout)) if with_adapter else nn.Identity()
        if with_adapter:
            nn.init.eye_(self.adapter[0].weight)
        self.frozen = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).requires_grad_(False)

    def encode(self, prompts):
        ids = [[ord(c) % 32 for c in p[:4].ljust(4)] for p in prompts]
        return Conditioning(self.adapter(self.table(torch.tensor(ids))))


class Squares(Data):
    """Grey squares of different brightness, with their index as the prompt."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"prompt": self.prompt(index), "image": torch.full((3, 8, 8), index / 10)}

    def prompt(self, index):
        return f"{index}"


class BareWords(Squares):
    has_images = False

    def __getitem__(self, index):
        return {"prompt": self.prompt(index)}


def red(images, prompts):
    """The mean of the red channel."""
    return images[:, 0].mean((1, 2))


class TinyBackboneConfig(BackboneConfig):
    name: str = "tiny-backbone"
    prediction: str = "epsilon"

    def build(self, runtime):
        return tiny_backbone(self.prediction)


class ToyEncoderConfig(EncoderConfig):
    name: str = "toy-encoder"
    with_adapter: bool = True
    dropout: float = 0.1

    def build(self, runtime):
        torch.manual_seed(0)
        return ToyEncoder(self.with_adapter, self.dropout)


class SquaresConfig(DataConfig):
    name: str = "squares"

    def build(self, runtime):
        return Squares()


class BareWordsConfig(DataConfig):
    name: str = "bare-words"

    def build(self, runtime):
        return BareWords()


PARTS = (
    (backbones, "tiny-backbone", TinyBackboneConfig),
    (encoders, "toy-encoder", ToyEncoderConfig),
    (data, "squares", SquaresConfig),
    (data, "bare-words", BareWordsConfig),
    (rewards, "red", red),
)


def finished(config):
    """A run that has been trained to its end, to inspect its parts; ``run.folder`` is its last checkpoint."""
    config = load_config(config)
    run = Run(config, Runtime.detect(config.loop.precision))
    try:
        run.train(lambda: False)
    finally:
        run.close()
    return run


def register():
    for kind, name, part in PARTS:
        kind.register(name, part)


def unregister():
    for kind, name, _ in PARTS:
        kind.unregister(name)


def align_config(output, **loop):
    settings = {"steps": 4, "batch_size": 3, "lr": 1e-2, "save_every": 2, "log_every": 1, **loop}
    return {
        "backbone": "tiny-backbone",
        "encoder": "toy-encoder",
        "trainer": {"name": "align", "lora": {"rank": 2}, "caption_dropout": 0.3},
        "data": "squares",
        "loop": settings,
        "output": str(output),
    }


def reward_config(output, trainer=None, **loop):
    config = align_config(output, **loop)
    defaults = {"name": "reward", "lora": {"rank": 2}, "num_steps": 2, "guidance": 3.0}
    gradient_steps = {"gradient_steps": {"name": "grouped-random", "groups": 1}}
    return {
        **config,
        "data": "bare-words",
        "rewards": ["red"],
        "trainer": {**defaults, **gradient_steps, **(trainer or {})},
    }
