"""What a reward step takes, by how many sampling steps carry gradient, against plain autograd.

Plain: autograd through the whole rollout, each chosen call of the UNet in torch's checkpointing of its own, as the
published code describes it. Every measurement is a process of its own; all wait for each other and take turns, one step
in each round, so that a noisy machine disturbs them alike. Seconds are medians over the rounds; memory is a process's
peak less what it held before its first step. The gradients of both ways are compared. By themselves, at one number of
steps: what repeating several calls in one, and convolutions with channels last, change.

UNet, VAE and reward have random weights; guidance is on, and a LoRA is trained. Run
``python benchmarks/reward_step.py [--rounds 2] [--pixels 192] [--width 64]``; it writes a table beside itself. It takes
six minutes on two cores with 0.1 TFLOP/s, with 256 pixels and three rounds a quarter of an hour. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TEXT = (77, 128)
"""Tokens of a prompt and their width."""


@dataclass(frozen=True)
class Setting:
    """One measurement: a way of computing the gradient, how many steps carry it, and the sizes."""

    way: str
    chosen: int
    pixels: int
    width: int
    batch: int
    steps: int
    replay_batch: int = 1
    channels_last: bool = False


def build(setting: Setting) -> Any:
    """A reward trainer on random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from longalign.backbones.configs import LoraConfig
    from longalign.backbones.sd import SDBackbone
    from longalign.encoders.base import Conditioning, Encoder
    from longalign.schedules.steps import GroupedRandom
    from longalign.trainers.configs import RewardConfig
    from longalign.trainers.reward import RewardTrainer

    class Random(Encoder):
        """Random states."""

        dim = TEXT[1]

        def encode(self, prompts: Sequence[str]) -> Conditioning:
            return Conditioning(torch.randn((len(prompts), *TEXT), generator=torch.Generator().manual_seed(0)))

    def warm(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))

    torch.manual_seed(0)
    width = setting.width
    unet = UNet2DConditionModel(
        sample_size=setting.pixels // 8, cross_attention_dim=TEXT[1], attention_head_dim=8,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width), layers_per_block=2,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    levels = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    backbone = SDBackbone(unet, vae, levels, "epsilon")
    schedule: Any = {"name": "grouped-random", "groups": setting.chosen}
    lora, calls = LoraConfig(rank=16, dropout=0), setting.replay_batch
    config = RewardConfig(lora=lora, num_steps=setting.steps, schedule=schedule, replay_batch=calls)
    trainer = RewardTrainer.from_config(config, backbone, Random(), [warm], GroupedRandom(setting.chosen))
    for name, parameter in trainer.named_parameters():
        if ".lora_B." in name:  # zero at first, which would leave the other factor without gradient
            torch.nn.init.normal_(parameter, std=0.01)
    if setting.channels_last:
        backbone.use_channels_last()
    return trainer.to("cuda" if torch.cuda.is_available() else "cpu")


def plain(trainer: Any, prompts: Sequence[str]) -> None:
    """The reference: autograd through the rollout, with one checkpoint for each chosen call."""
    import torch
    from torch.utils.checkpoint import checkpoint

    told, latents, solver = trainer.told(prompts), trainer.noise(len(prompts)), trainer.solver
    chosen = trainer.schedule.pick(len(solver)).steps
    predict = trainer.predictor(trainer.backbone.predict, told, slice(0, len(prompts)))
    for index, timestep in enumerate(solver.timesteps):
        timesteps = torch.full((len(prompts),), timestep, device=latents.device)
        if index in chosen:
            output = checkpoint(predict, latents.detach(), timesteps, use_reentrant=False)
        else:
            with torch.no_grad():
                output = predict(latents.detach(), timesteps)
        latents = solver.a[index] * latents + solver.b[index] * output
    images = trainer.backbone.decode(latents)
    (0.5 * (1 - trainer.rewards[0].score(images, prompts).mean())).backward()


def step(trainer: Any, setting: Setting) -> float:
    """One step with the same noise each time; returns its seconds."""
    import torch

    prompts = ["a prompt"] * setting.batch
    trainer.train()
    trainer.zero_grad()
    torch.manual_seed(1)
    began = time.perf_counter()
    if setting.way == "plain":
        plain(trainer, prompts)
    else:
        trainer.step({"prompt": prompts}, torch.Tensor.backward)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(setting: Setting, file: str) -> None:
    """A process of its own: says when it is ready, takes a step for each line that it is told, and writes down the
    gradient and, in GiB, the memory that it held before and its peak."""
    import torch

    trainer = build(setting)
    on_gpu, before = torch.cuda.is_available(), _resident()
    if on_gpu:
        before = torch.cuda.memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step(trainer, setting), flush=True)
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in trainer.trainable()])
    parameters = sum(p.numel() for n, p in trainer.backbone.denoiser.named_parameters() if "lora" not in n)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    torch.save({"gradient": gradient, "before": before, "peak": peak, "parameters": parameters}, file)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class Process:
    """A measurement that is under way."""

    def __init__(self, setting: Setting, file: Path):
        self.setting, self.file, self.seconds = setting, file, []
        command = [sys.executable, __file__, "--measure", json.dumps(asdict(setting)), str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._hear()

    def _hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a measurement failed: {self.setting}")
        return line

    def step(self) -> None:
        """Takes one step and notes its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.seconds.append(float(self._hear()))
        print(self.setting, f"{self.seconds[-1]:.2f} s", flush=True)

    def end(self) -> dict[str, Any]:
        """Median seconds, GiB at the peak beyond what it held before, the gradient, the UNet's parameters."""
        import torch

        assert self.process.stdin is not None
        self.process.stdin.close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = status
        if status:
            raise SystemExit(f"a measurement failed: {self.setting}")
        told = torch.load(self.file, weights_only=True)
        peak = usage.ru_maxrss / 2**20 if told["peak"] is None else told["peak"]
        return {**told, "seconds": statistics.median(self.seconds), "memory": peak - told["before"]}


def distance(a: Any, b: Any) -> float:
    """``|a - b| / |b|``."""
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=192, help="of the images, eight times those of the latents (192)")
    parser.add_argument("--width", type=int, default=64, help="channels of the UNet's first level (64)")
    parser.add_argument("--batch", type=int, default=2, help="images in a step (2)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (50)")
    parser.add_argument(
        "--chosen", type=int, nargs="+", default=[1, 5, 10, 50], help="of them with gradient (1 5 10 50)"
    )
    parser.add_argument("--replay-batch", type=int, default=5, help="calls repeated in one, for the second table (5)")
    parser.add_argument("--at", type=int, default=10, help="steps with gradient in the second table (10)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="of the table")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Setting(**json.loads(options.measure[0])), options.measure[1])
        return

    from longalign.record import machine

    sizes = {key: getattr(options, key) for key in ("pixels", "width", "batch", "steps")}
    pairs = {k: [Setting(way, k, **sizes) for way in ("plain", "longalign")] for k in options.chosen}
    together = f"{options.replay_batch} calls repeated in one"
    variants = {
        "one call at a time": Setting("longalign", options.at, **sizes),
        together: Setting("longalign", options.at, replay_batch=options.replay_batch, **sizes),
        "channels last": Setting("longalign", options.at, channels_last=True, **sizes),
    }
    settings = dict.fromkeys([s for pair in pairs.values() for s in pair] + list(variants.values()))
    with tempfile.TemporaryDirectory() as folder:
        processes = {s: Process(s, Path(folder) / f"{i}.pt") for i, s in enumerate(settings)}
        for _ in range(options.rounds):
            for process in processes.values():
                process.step()
        found = {s: process.end() for s, process in processes.items()}

    some = next(iter(found.values()))
    lines = [
        "# A reward step", "", "`python benchmarks/reward_step.py" + _given(options, parser) + "`", "",
        f"A UNet of {some['parameters'] / 1e6:.1f}M parameters with random weights and a LoRA of rank 16, "
        f"{options.batch} images of {options.pixels} x {options.pixels} pixels, {options.steps} DDIM steps with "
        f"guidance, float32. Medians of {options.rounds} round(s); memory is the peak beyond what the process held "
        "before its first step. Plain is autograd through the rollout with a checkpoint for each call with gradient.",
        "", "| steps with gradient | seconds, plain | seconds, longalign | ratio | GiB, plain | GiB, longalign | ratio "
        "| relative difference of the gradients |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for chosen, pair in pairs.items():
        a, b = (found[s] for s in pair)
        lines.append(
            f"| {chosen} | {a['seconds']:.2f} | {b['seconds']:.2f} | {b['seconds'] / a['seconds']:.2f} "
            f"| {a['memory']:.2f} | {b['memory']:.2f} | {b['memory'] / a['memory']:.2f} "
            f"| {distance(b['gradient'], a['gradient']):.1e} |"
        )
    first = found[variants["one call at a time"]]
    lines += [
        "", f"What settings change, each by itself, with {options.at} steps that carry gradient:", "",
        "| longalign with | seconds | ratio | GiB | ratio | relative difference of the gradients |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, setting in variants.items():
        a = found[setting]
        lines.append(
            f"| {name} | {a['seconds']:.2f} | {a['seconds'] / first['seconds']:.2f} | {a['memory']:.2f} "
            f"| {a['memory'] / first['memory']:.2f} | {distance(a['gradient'], first['gradient']):.1e} |"
        )
    lines += ["", "Machine: " + ", ".join(f"{k} {v}" for k, v in machine().items()) + "."]
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _given(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The options that are not the defaults, as they were given."""
    given = ""
    for key, value in vars(options).items():
        if value != parser.get_default(key) and key not in ("output", "measure"):
            values = value if isinstance(value, list) else [value]
            given += f" --{key.replace('_', '-')} {' '.join(map(str, values))}"
    return given


if __name__ == "__main__":
    main()
