"""Runs of each trainer with the tiny parts of `worlds`, for `test_processes`.

The tests launch this file in two processes, which train with DDP and then with FSDP, and call `train` in one. Noise is
sampled for the global batch and each process takes its rows, so it does not depend on the number of processes.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch
import worlds
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from longalign.config.run import load_config
from longalign.loop.run import Run
from longalign.registry import rewards
from longalign.rewards.base import EmbeddingReward
from longalign.rewards.config import RewardConfig
from longalign.runtime import Runtime

BATCH, STEPS = 4, 4
EPS = 1e-2
"""AdamW's eps, far above rounding errors of the gradient. With the default 1e-8, the sign of a rounding error makes a
full step, so the weights of equal runs would depend on the number of threads and on the processor."""


class Colours(EmbeddingReward):
    """Compares an image's mean colour with a vector of the prompt's first letter; vectors share a common direction."""

    dim = 3

    def image_features(self, images):
        return normalize(images.mean((2, 3)) - 0.3, dim=-1)

    def text_features(self, prompts):
        letters = torch.tensor([float(ord(p[0])) for p in prompts])
        return normalize(1 + torch.stack([letters.sin(), letters.cos(), (2 * letters).sin()], -1), dim=-1)


class ColoursConfig(RewardConfig):
    target: ClassVar[str] = "launched:Colours"
    embeds: ClassVar[bool] = True

    name: str = "colours"

    def build(self, runtime):
        return Colours()


class Noise:
    """Samples call k for the global batch with a generator seeded by k, and returns the rows of this process."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.num_calls, self.seed = rank, world_size, 0, None
        self.real = {name: getattr(torch, name) for name in ("rand", "randn", "randint")}

    def rows(self, name, *args, size, generator=None, **kwargs):
        if generator is not None:
            return self.real[name](*args, size, generator=generator, **kwargs)
        self.seed, self.num_calls = torch.initial_seed(), self.num_calls + 1
        generator = torch.Generator().manual_seed(self.num_calls)
        batch = self.real[name](*args, (size[0] * self.world_size, *size[1:]), generator=generator)
        return batch[self.rank * size[0] :][: size[0]]

    @contextmanager
    def patched(self):
        """Context manager: replaces torch's sampling functions."""

        def sized(name):
            return lambda *size, **kwargs: self.rows(name, size=size if isinstance(size[0], int) else size[0], **kwargs)

        def integers(*args, **kwargs):
            return self.rows("randint", *args[:-1], size=args[-1], **kwargs)

        with (
            mock.patch.multiple(torch, rand=sized("rand"), randn=sized("randn"), randint=integers),
            mock.patch.object(torch, "randn_like", lambda x: self.rows("randn", size=x.shape)),
        ):
            yield


def configs(folder, world_size):
    """Configs of an align run with half of its steps, the same run resumed, a reward run and a distillation."""
    lora, encoder = {"rank": 2, "dropout": 0.0}, {"name": "toy-encoder", "dropout": 0.0}
    loop = {"batch_size": BATCH // world_size, "steps": STEPS, "save_every": 2, "keep": None, "lr": 1e-2}
    align = worlds.align_config(folder / "align", **loop, accumulation=2, ema=0.5, warmup=2)
    align |= {"encoder": encoder, "trainer": {**align["trainer"], "lora": lora}}
    align["monitor"] = {"prompts": ["ab", "cd"], "every": 2, "num_steps": 2, "guidance": 2.0}
    align["monitor"] |= {"metrics": [{"name": "reward", "reward": "red"}], "keep_best": {"metric": "red"}}
    gradient_steps = {"name": "grouped-random", "groups": 2}
    trainer = {"lora": lora, "num_steps": 4, "gradient_steps": gradient_steps, "train_adapter": True}
    trainer |= {"regularizer": "pretraining", "regularizer_weight": 0.1}
    reward = worlds.reward_config(folder / "reward", trainer, **loop)
    scores = [{"name": "reweighted", "inner": "colours", "direction": direction} for direction in ("batch", "running")]
    pairs = {"name": "pairs", "positive": "x", "negative": ""}
    scores += [{"name": "edited", "inner": "colours", "direction": "running", "edit": pairs}]
    reward |= {"encoder": encoder, "data": "squares", "rewards": scores}
    first_half = {**align, "loop": {**align["loop"], "steps": STEPS // 2}}
    lcm = {**align, "output": str(folder / "lcm"), "monitor": None}
    lcm |= {"loop": {**align["loop"], "steps": 2, "accumulation": 1, "ema": None}}
    # with a small c the loss is the absolute error, whose gradient near zero is the sign of a rounding error
    lcm |= {"trainer": {"name": "lcm", "lora": lora, "huber_c": 1.0}}
    resumed = (align, folder / "align" / "checkpoint-000002")
    return {"first_half": (first_half, None), "align": resumed, "reward": (reward, None), "lcm": (lcm, None)}


def pair_configs(folder, world_size):
    """Config of a preference model that starts from the CLIP in ``folder/clip``."""
    loop = {"batch_size": BATCH // world_size, "steps": 2, "log_every": 1, "lr": 1e-2}
    data = {"name": "scene-pairs", "size": 8, "objects": [1, 3], "words": [10, 40], "captions": True}
    reward = {"name": "denscore", "checkpoint": str(folder / "clip")}
    config = {"rewards": [reward], "trainer": "denscore", "data": data, "loop": loop}
    return {"denscore": ({**config, "output": str(folder / "denscore")}, None)}


def fsdp_configs(folder, world_size):
    """As `configs` with a shorter reward run, and full fine-tuning runs without and with a reference model."""
    runs = configs(folder, world_size)
    align, reward = runs["align"][0], runs.pop("reward")[0]
    short = {"steps": 2, "accumulation": 1, "ema": None}
    reward = {**reward, "output": str(folder / "short-reward"), "loop": {**reward["loop"], "steps": 2}}
    full = {**align, "output": str(folder / "full"), "monitor": None}
    full |= {"loop": {**align["loop"], **short, "clip": 1e-3, "gradient_checkpointing": True}}
    full |= {"trainer": {**align["trainer"], "lora": None, "train_adapter": False}}
    regularized = {"regularizer": "kl", "regularizer_weight": 0.1, "lora": None, "train_adapter": False}
    regularized |= {"gradient_steps": {"name": "draft-k", "k": 2}}
    kl = {**reward, "output": str(folder / "kl"), "trainer": {**reward["trainer"], **regularized}}
    return {**runs, "short-reward": (reward, None), "full": (full, None), "kl": (kl, None)}


def bf16_configs(folder, world_size):
    """Config of a short align run in bfloat16."""
    align = configs(folder, world_size)["align"][0]
    loop = {**align["loop"], "steps": 2, "accumulation": 1, "precision": "bf16"}
    return {"half": ({**align, "output": str(folder / "half"), "monitor": None, "loop": loop}, None)}


def all_configs(folder, world_size):
    """The configs of all runs; those that are in several of the functions above are equal."""
    made = (make(folder, world_size) for make in (configs, pair_configs, fsdp_configs, bf16_configs))
    return {name: run for runs in made for name, run in runs.items()}


def counting_hook(buckets, bucket):
    """Exchanges gradients as DDP does by default, and records the bucket."""
    buckets.append(bucket.index())
    return allreduce_hook(None, bucket)


def train(folder, rank=0, world_size=1, configs=configs):
    """Runs all configs.

    Returns for each the number of gradient exchanges and wrapped modules, the seed of torch, the number of calls of the
    denoiser, and the fraction of its weights that this process holds.
    """
    results, noise = {}, Noise(rank, world_size)
    for name, (config, resume) in configs(folder, world_size).items():
        if name != "align":
            noise.num_calls = 0
        buckets = []
        run = Run(load_config(config), Runtime.detect(config["loop"].get("precision", "no")), resume)
        optimization, composition = run.optimization, run.composition
        for group in optimization.optimizer.optimizer.param_groups:
            group["eps"] = EPS
        for module in optimization.wrapped:
            if isinstance(module, DistributedDataParallel):
                module.register_comm_hook(buckets, counting_hook)
        model = composition.trainer if run.config.backbone is None else composition.backbone.denoiser
        weights, calls = list(model.parameters()), []
        local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights)
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with noise.patched():
            run.train(lambda: False)
        run.close()
        results[name] = {"exchanged": len(buckets), "modules": len(optimization.wrapped), "seed": noise.seed}
        results[name] |= {"calls": len(calls), "shard": local / sum(p.numel() for p in weights)}
        assert (run.accelerator.num_processes, run.accelerator.process_index) == (world_size, rank)
    return results


@contextmanager
def registered():
    """Context manager: registers the parts of `worlds` and the reward ``colours``."""
    worlds.register()
    rewards.register("colours", ColoursConfig)
    try:
        yield
    finally:
        rewards.unregister("colours")
        worlds.unregister()


def launch(folder, *settings):
    """Runs this file in two processes with accelerate's launcher and its settings for FSDP.

    The runs with DDP are in the folder ``ddp``, those with FSDP in ``fsdp``.

    If a process dies of a segmentation fault, the launch is repeated once, with a warning: one of about
    thirty launches of FSDP on two CPU processes crashed inside a collective of torch's gloo backend.
    """
    file = Path(__file__)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONFAULTHANDLER"] = "1"  # prints the stack of a process that crashes in native code
    paths = [str(file.parent), str(file.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings, "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(file), str(folder)]
    start = partial(subprocess.run, command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    inputs = shutil.copytree(folder, f"{folder}-inputs")
    process = start()
    if "SIGSEGV" in process.stderr:
        warnings.warn(f"a launched process crashed and is started again:\n{process.stderr[-4000:]}", stacklevel=2)
        shutil.rmtree(folder)
        shutil.copytree(inputs, folder)
        process = start()
    assert process.returncode == 0, process.stderr[-4000:]


def lines(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_runs(actual, expected):
    """Asserts that two runs have equal logs and weights up to rounding; returns the weights by checkpoint name."""
    times = ("seconds", "monitor/seconds", "monitor/share_of_time")
    logs = [[{k: v for k, v in line.items() if k not in times} for line in lines(run)] for run in (actual, expected)]
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    checkpoints = {}
    for name in sorted(p.name for p in expected.glob("checkpoint-*")):
        one, other = (load_file(run / name / "longalign.safetensors") for run in (actual, expected))
        assert one.keys() == other.keys()
        for key, weight in other.items():
            torch.testing.assert_close(one[key], weight, rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
        checkpoints[name] = one
    return checkpoints


def train_and_write(folder, name, makers):
    """Runs all configs in a process of the launch, in the folder of this name."""
    rank, world_size, results = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {}
    for make_configs in makers:
        if name == "fsdp":
            # accelerate enables FSDP on accelerators only, so the CPU process group is declared as one
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        results |= train(folder / name, rank, world_size, make_configs)
    (folder / name / f"results-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    PartialState(cpu=True)
    assert os.environ.pop("ACCELERATE_USE_FSDP") == "true"
    with registered():
        train_and_write(Path(sys.argv[1]), "ddp", (configs, pair_configs))
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        AcceleratorState._reset_state()
        train_and_write(Path(sys.argv[1]), "fsdp", (fsdp_configs, bf16_configs))
    torch.distributed.destroy_process_group()
