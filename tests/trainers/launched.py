"""What `test_processes` starts in two processes, and runs by itself in one: a run of each kind in the tiny worlds.

Noise is drawn for the whole batch, and each process takes its rows, so that it is the same for any number of processes.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import worlds
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from longalign.compose import build_from_config
from longalign.registry import PartConfig, rewards
from longalign.rewards.base import EmbeddingReward
from longalign.trainers.loop import Run

BATCH, STEPS = 4, 4


class Colours(EmbeddingReward):
    """The mean colour of an image against numbers made of the prompt's first letter, all with a direction in common."""

    dim = 3

    def image_features(self, images):
        return normalize(images.mean((2, 3)) - 0.3, dim=-1)

    def text_features(self, prompts):
        letters = torch.tensor([float(ord(p[0])) for p in prompts])
        return normalize(1 + torch.stack([letters.sin(), letters.cos(), (2 * letters).sin()], -1), dim=-1)


class ColoursConfig(PartConfig):
    name: str = "colours"

    def build(self, runtime):
        return Colours()


class Noise:
    """Draws number k from its own generator, for the whole batch; gives this process its rows."""

    def __init__(self, rank, processes):
        self.rank, self.processes, self.drawn, self.seed = rank, processes, 0, None
        self.real = {name: getattr(torch, name) for name in ("rand", "randn", "randint")}

    def rows(self, name, *numbers, size, generator=None, **about):
        if generator is not None:
            return self.real[name](*numbers, size, generator=generator, **about)
        self.seed, self.drawn = torch.initial_seed(), self.drawn + 1
        own = torch.Generator().manual_seed(self.drawn)
        whole = self.real[name](*numbers, (size[0] * self.processes, *size[1:]), generator=own)
        return whole[self.rank * size[0] :][: size[0]]

    @contextmanager
    def drawing(self):
        def sized(name):
            return lambda *size, **about: self.rows(name, size=size if isinstance(size[0], int) else size[0], **about)

        def integers(*numbers, **about):
            return self.rows("randint", *numbers[:-1], size=numbers[-1], **about)

        with (
            mock.patch.multiple(torch, rand=sized("rand"), randn=sized("randn"), randint=integers),
            mock.patch.object(torch, "randn_like", lambda x: self.rows("randn", size=x.shape)),
        ):
            yield


def configs(folder, processes):
    """An align run that is cut after half of its steps, the same to its end, and a reward run."""
    lora, encoder = {"rank": 2, "dropout": 0.0}, {"name": "toy-encoder", "dropout": 0.0}
    loop = {"batch_size": BATCH // processes, "steps": STEPS, "save_every": 2, "keep": None, "lr": 1e-2}
    align = worlds.align_config(folder / "align", **loop, accumulation=2, ema=0.5, warmup=2)
    align |= {"encoder": encoder, "trainer": {**align["trainer"], "lora": lora}}
    align["validation"] = {"prompts": ["ab"], "every": 2, "steps": 2, "guidance": 2.0}
    schedule = {"name": "grouped-random", "groups": 2}
    trainer = {"lora": lora, "num_steps": 4, "schedule": schedule, "train_adapter": True}
    trainer |= {"regularizer": "pretraining", "regularizer_weight": 0.1}
    reward = worlds.reward_config(folder / "reward", trainer, **loop)
    scores = [{"name": "reweighted", "inner": "colours", "direction": direction} for direction in ("batch", "running")]
    reward |= {"encoder": encoder, "data": "squares", "rewards": scores}
    cut = {**align, "loop": {**align["loop"], "steps": STEPS // 2}}
    return {"cut": (cut, None), "align": (align, folder / "align" / "checkpoint-000002"), "reward": (reward, None)}


def counted(exchanged, bucket):
    """Exchanges gradients as without a hook, and counts that."""
    exchanged.append(bucket.index())
    return allreduce_hook(None, bucket)


def train(folder, rank=0, processes=1):
    """Trains all; returns for each kind how often gradients were exchanged, and what torch was seeded with."""
    told, noise = {}, Noise(rank, processes)
    for name, (config, resume) in configs(folder, processes).items():
        if name == "reward":
            noise.drawn = 0
        exchanged = []
        run = Run(build_from_config(config), resume)
        for module in run.wrapped:
            if isinstance(module, DistributedDataParallel):
                module.register_comm_hook(exchanged, counted)
        with noise.drawing():
            run.train(lambda: False)
        run.close()
        told[name] = {"exchanged": len(exchanged), "modules": len(run.wrapped), "seed": noise.seed}
        assert (run.accelerator.num_processes, run.accelerator.process_index) == (processes, rank)
    return told


@contextmanager
def registered():
    """Inside, the parts of the tiny worlds are there."""
    worlds.register()
    rewards.register("colours", ColoursConfig)
    try:
        yield
    finally:
        rewards.unregister("colours")
        worlds.unregister()


if __name__ == "__main__":
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with registered():
        told = train(Path(sys.argv[1]), rank, processes)
    (Path(sys.argv[1]) / f"told-{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
