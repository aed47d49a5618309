"""What `test_processes` starts in two processes, and runs by itself in one: a run of each kind in the tiny worlds.

Noise is drawn for the whole batch, and each process takes its rows, so that it is the same for any number of processes.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from longalign.compose import build_from_config
from longalign.registry import PartConfig, rewards
from longalign.rewards.base import EmbeddingReward
from longalign.trainers.loop import Run

BATCH, STEPS = 4, 4
EPS = 1e-2
"""AdamW's eps, far above what rounding makes of a gradient. With AdamW's own, 1e-8, the sign of a rounding error is a
whole step, so the weights of equal runs would depend on the number of threads and on the processor."""


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
    """An align run that is cut after half of its steps, the same to its end, a reward run and a distillation."""
    lora, encoder = {"rank": 2, "dropout": 0.0}, {"name": "toy-encoder", "dropout": 0.0}
    loop = {"batch_size": BATCH // processes, "steps": STEPS, "save_every": 2, "keep": None, "lr": 1e-2}
    align = worlds.align_config(folder / "align", **loop, accumulation=2, ema=0.5, warmup=2)
    align |= {"encoder": encoder, "trainer": {**align["trainer"], "lora": lora}}
    align["validation"] = {"prompts": ["ab"], "every": 2, "num_steps": 2, "guidance": 2.0}
    gradient_steps = {"name": "grouped-random", "groups": 2}
    trainer = {"lora": lora, "num_steps": 4, "gradient_steps": gradient_steps, "train_adapter": True}
    trainer |= {"regularizer": "pretraining", "regularizer_weight": 0.1}
    reward = worlds.reward_config(folder / "reward", trainer, **loop)
    scores = [{"name": "reweighted", "inner": "colours", "direction": direction} for direction in ("batch", "running")]
    reward |= {"encoder": encoder, "data": "squares", "rewards": scores}
    cut = {**align, "loop": {**align["loop"], "steps": STEPS // 2}}
    lcm = {**align, "output": str(folder / "lcm"), "validation": None}
    lcm |= {"loop": {**align["loop"], "steps": 2, "accumulation": 1, "ema": None}}
    # with a smaller c the loss is the absolute error, whose gradient is a sign: that of rounding near zero
    lcm |= {"trainer": {"name": "lcm", "lora": lora, "huber_c": 1.0}}
    resumed = (align, folder / "align" / "checkpoint-000002")
    return {"cut": (cut, None), "align": resumed, "reward": (reward, None), "lcm": (lcm, None)}


def pair_configs(folder, processes):
    """Training of a preference model, the CLIP that lies in the folder."""
    loop = {"batch_size": BATCH // processes, "steps": 2, "log_every": 1, "lr": 1e-2}
    data = {"name": "scene-pairs", "size": 8, "objects": [1, 3], "words": [10, 40], "captions": True}
    reward = {"name": "denscore", "checkpoint": str(folder / "clip")}
    config = {"rewards": [reward], "trainer": "denscore", "data": data, "loop": loop}
    return {"denscore": ({**config, "output": str(folder / "denscore")}, None)}


def split_configs(folder, processes):
    """As `configs`, and runs of all weights, alone and with a start model."""
    found = configs(folder, processes)
    align, reward = found["align"][0], found["reward"][0]
    short = {"steps": 2, "accumulation": 1, "ema": None}
    reward = {**reward, "loop": {**reward["loop"], "steps": 2}}
    full = {**align, "output": str(folder / "full"), "validation": None}
    full |= {"loop": {**align["loop"], **short, "clip": 1e-3, "gradient_checkpointing": True}}
    full |= {"trainer": {**align["trainer"], "lora": None, "train_adapter": False}}
    drift = {"regularizer": "kl", "regularizer_weight": 0.1, "lora": None, "train_adapter": False}
    drift |= {"gradient_steps": {"name": "draft-k", "k": 2}}
    kl = {**reward, "output": str(folder / "kl"), "trainer": {**reward["trainer"], **drift}}
    alone = {"reward": reward, "full": full, "kl": kl}
    return {**found, **{name: (config, None) for name, config in alone.items()}}


def half_configs(folder, processes):
    """A short align run in half precision."""
    align = configs(folder, processes)["align"][0]
    loop = {**align["loop"], "steps": 2, "accumulation": 1, "precision": "bf16"}
    return {"half": ({**align, "output": str(folder / "half"), "validation": None, "loop": loop}, None)}


def counted(exchanged, bucket):
    """Exchanges gradients as without a hook, and counts that."""
    exchanged.append(bucket.index())
    return allreduce_hook(None, bucket)


def train(folder, rank=0, processes=1, configs=configs):
    """Trains all; returns for each kind how often gradients were exchanged, what torch was seeded with, how often the
    denoiser was called, and how much of its weights this process keeps."""
    results, noise = {}, Noise(rank, processes)
    for name, (config, resume) in configs(folder, processes).items():
        if name != "align":
            noise.drawn = 0
        exchanged = []
        run = Run(build_from_config(config), resume)
        for group in run.optimizer.optimizer.param_groups:
            group["eps"] = EPS
        for module in run.wrapped:
            if isinstance(module, DistributedDataParallel):
                module.register_comm_hook(exchanged, counted)
        trained = run.trainer if run.backbone is None else run.backbone.denoiser
        weights, calls = list(trained.parameters()), []
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights)
        trained.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with noise.drawing():
            run.train(lambda: False)
        run.close()
        results[name] = {"exchanged": len(exchanged), "modules": len(run.wrapped), "seed": noise.seed}
        results[name] |= {"calls": len(calls), "shard": held / sum(p.numel() for p in weights)}
        assert (run.accelerator.num_processes, run.accelerator.process_index) == (processes, rank)
    return results


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


def launch(folder, *settings):
    """Starts this file in two processes by accelerate's launcher."""
    here = Path(__file__)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings, "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(here), str(folder)], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


def lines(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(ours, theirs):
    """Two runs have the same log and weights but for rounding; returns the weights of each checkpoint by its name."""
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines(run)] for run in (ours, theirs)]
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    found = {}
    for name in sorted(p.name for p in theirs.glob("checkpoint-*")):
        one, other = (load_file(run / name / "longalign.safetensors") for run in (ours, theirs))
        assert one.keys() == other.keys()
        for key, weight in other.items():
            torch.testing.assert_close(one[key], weight, rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
        found[name] = one
    return found


if __name__ == "__main__":
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results, split = {}, os.environ.get("ACCELERATE_USE_FSDP") == "true"
    with registered():
        for some in (split_configs, half_configs) if split else (configs, pair_configs):
            if split:
                # accelerate splits weights on accelerators only; all that follows is as it would be there
                PartialState(cpu=True)
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            results |= train(Path(sys.argv[1]), rank, processes, some)
    (Path(sys.argv[1]) / f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
