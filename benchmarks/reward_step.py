"""Time and memory of a reward step against plain autograd, by the number of sampling steps that carry gradient.

Plain is autograd through the whole rollout. Without checkpoints it keeps the activations of every chosen UNet call.
With checkpoints each chosen call is checkpointed by torch, as the published code describes it. The latter holds little
more than longalign, which replays these calls itself. Only longalign can process a part of the batch at a time, because
autograd needs one rollout. This is measured separately, with other settings, at one number of steps.

Each measurement runs in its own process. The processes alternate, one step per round, so that noise of the machine
affects all of them equally. Each first runs a step of a tiny model, which loads code and starts threads. Seconds are
medians over the rounds. Memory is the peak of a process minus its memory before the first step. All gradients are
compared.

UNet, VAE and reward have random weights. Guidance is on, and a LoRA is trained. Run
``python benchmarks/reward_step.py [--rounds 2] [--pixels 128] [--width 32]``. It writes a table next to itself and
takes eight minutes on two cores with 0.13 TFLOP/s. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TEXT = (77, 128)
"""Number of tokens of a prompt and their width."""
BARE, PLAIN, OURS = "plain, no checkpoints", "plain, checkpoints", "longalign"

SERVER = multiprocessing.get_context("forkserver")
"""Processes are forked from a server that has imported all modules and run no computation."""


@dataclass(frozen=True)
class Setting:
    """One measurement: the gradient method, the number of gradient steps, sizes, and settings of longalign."""

    method: str
    chosen: int
    pixels: int
    width: int
    batch: int
    steps: int
    replay_batch: int = 1
    replay: str = "recompute"
    denoise_batch: int | None = None
    decode_batch: int | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False


def build(setting: Setting) -> Any:
    """Builds a reward trainer with random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from longalign.backbones.config import LoraConfig
    from longalign.backbones.stable_diffusion.sd import SDBackbone
    from longalign.encoders.base import Conditioning, Encoder
    from longalign.runtime import Runtime
    from longalign.trainers.reward.config import RewardConfig
    from longalign.trainers.reward.trainer import RewardTrainer

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
        block_out_channels=(width, 2 * width, 4 * width, 4 * width), layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    levels = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    backbone = SDBackbone(unet, vae, levels, "epsilon")
    calls = {key: getattr(setting, key) for key in ("replay_batch", "replay", "denoise_batch", "decode_batch")}
    gradient_steps: Any = {"name": "grouped-random", "groups": setting.chosen}
    config = RewardConfig(
        lora=LoraConfig(rank=16, dropout=0), num_steps=setting.steps, gradient_steps=gradient_steps, **calls
    )
    parts: dict[str, Any] = {"backbone": backbone, "encoder": Random(), "rewards": [warm]}
    trainer = RewardTrainer.from_config(config, Runtime(), **parts)
    for name, parameter in trainer.named_parameters():
        if ".lora_B." in name:  # initialized to zero, so lora_A would have no gradient
            torch.nn.init.normal_(parameter, std=0.01)
    if setting.gradient_checkpointing:
        trainer.enable_gradient_checkpointing()
    if setting.channels_last:
        backbone.use_channels_last()
    if setting.compile:
        backbone.wrap_denoiser(torch.compile(backbone.denoiser))
    return trainer.to("cuda" if torch.cuda.is_available() else "cpu")


def plain(trainer: Any, prompts: Sequence[str], checkpoints: bool = True) -> None:
    """Reference: autograd through the rollout, with or without a checkpoint for each chosen call."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from longalign.trainers.diffusion import guided_prediction

    conditioning, latents, solver = trainer.encode_with_uncond(prompts), trainer.noise(len(prompts)), trainer.solver
    previous = None
    chosen = trainer.gradient_steps.select(len(solver)).steps
    rows = torch.arange(len(prompts), device=latents.device)

    def predict(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        denoise = trainer.backbone.predict
        return guided_prediction(denoise, latents, timesteps, conditioning, rows, trainer.guidance)

    for index, timestep in enumerate(solver.timesteps):
        inputs, timesteps = latents.detach(), torch.full((len(prompts),), timestep, device=latents.device)
        if index not in chosen:
            with torch.no_grad():
                output = predict(inputs, timesteps)
        elif checkpoints:
            output = checkpoint(predict, inputs, timesteps, use_reentrant=False)
        else:
            output = predict(inputs, timesteps)
        latents, previous = solver.step(index, latents, output, previous)
    images = trainer.backbone.decode(latents)
    (0.5 * (1 - trainer.rewards[0].score(images, prompts).mean())).backward()


def step(trainer: Any, setting: Setting) -> float:
    """Runs one step, always with the same noise; returns its seconds."""
    import torch

    prompts = ["a prompt"] * setting.batch
    trainer.train()
    trainer.zero_grad()
    torch.manual_seed(1)
    start = time.perf_counter()
    if setting.method == OURS:
        trainer.step({"prompt": prompts}, torch.Tensor.backward)
    else:
        plain(trainer, prompts, setting.method == PLAIN)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(setting: Setting, pipe: Any) -> None:
    """Worker process. It sends True when it is ready and runs one step for each True that it receives.

    For each step it sends the seconds and the peak GiB so far, minus the memory before the first step. After False it
    sends the gradient and the number of parameters of the UNet.
    """
    import torch

    tiny = replace(setting, chosen=1, pixels=64, width=32, batch=2, steps=2, compile=False)
    step(build(tiny), tiny)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory would hide allocations of the measured steps
    trainer = build(setting)
    if setting.compile:
        step(trainer, setting)  # compiles
    before = _allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pipe.send(True)
    while pipe.recv():
        pipe.send((step(trainer, setting), _peak() - before))
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in trainer.trainable()]).numpy()
    parameters = sum(p.numel() for n, p in trainer.backbone.denoiser.named_parameters() if "lora" not in n)
    pipe.send((gradient, parameters))


def _allocated() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _peak() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Measurement:
    """A worker process and its results.

    Attributes:
        seconds: median over its steps.
        memory: peak in GiB.
        gradient: set by `end`.
        parameters: number of parameters of the UNet, set by `end`.
    """

    def __init__(self, setting: Setting):
        self.setting, self.steps, self.memory = setting, [], 0.0
        self.gradient: Any = None
        self.parameters = 0
        self.pipe, child_pipe = SERVER.Pipe()
        self.process = SERVER.Process(target=measure, args=(setting, child_pipe))
        self.process.start()
        child_pipe.close()
        self._receive()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"a measurement failed: {self.setting}") from None

    def step(self) -> None:
        """Runs one step and records its seconds."""
        self.pipe.send(True)
        seconds, self.memory = self._receive()
        self.steps.append(seconds)
        print(self.setting, f"{seconds:.2f} s, {self.memory:.2f} GiB", flush=True)

    def end(self) -> None:
        """Stops the process and receives the gradient."""
        self.pipe.send(False)
        self.gradient, self.parameters = self._receive()
        self.process.join()

    @property
    def seconds(self) -> float:
        """Median of the steps."""
        return statistics.median(self.steps)

    def distance(self, other: Measurement) -> float:
        """``|a - b| / |b|`` of the gradients."""
        difference = self.gradient - other.gradient
        return float((difference @ difference) ** 0.5 / (other.gradient @ other.gradient) ** 0.5)


def expected_memory(chosen: int, measured: Mapping[int, float]) -> float:
    """Extrapolates the GiB of ``chosen`` graphs from the two largest measured numbers of graphs."""
    if not measured:
        return 0.0
    (count, memory), *rest = sorted(measured.items(), reverse=True)
    lower_count, lower_memory = rest[0] if rest else (0, 0.0)
    return memory + (chosen - count) * (memory - lower_memory) / (count - lower_count)


def run(settings: Sequence[Setting], rounds: int, cap: float) -> dict[Setting, Measurement]:
    """Measures all settings. Skips those without checkpoints that would take more than ``cap`` GiB."""
    SERVER.set_forkserver_preload(["longalign.backbones.stable_diffusion.sd", "longalign.trainers.reward.trainer"])
    measurements: dict[Setting, Measurement] = {}
    for setting in settings:
        graphs = {s.chosen: m.memory for s, m in measurements.items() if s.method == BARE}
        if setting.method == BARE and expected_memory(setting.chosen, graphs) > cap:
            print(setting, f"skipped: about {expected_memory(setting.chosen, graphs):.1f} GiB", flush=True)
            continue
        measurements[setting] = Measurement(setting)
        measurements[setting].step()
    for _ in range(rounds - 1):
        for measurement in measurements.values():
            measurement.step()
    for measurement in measurements.values():
        measurement.end()
    return measurements


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, followed by an empty line."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def non_default_options(
    options: argparse.Namespace, parser: argparse.ArgumentParser, skipped: Sequence[str] = ()
) -> str:
    """Options that differ from the defaults, as on the command line."""
    text = ""
    for key, value in vars(options).items():
        if value != parser.get_default(key) and key not in ("output", *skipped):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words = (f"{v:g}" if isinstance(v, float) else str(v) for v in values)
            text += " ".join([f" --{key.replace('_', '-')}", *words])
    return text


def ratio(a: float, b: float | None) -> str:
    return "-" if b is None else f"{a / b:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=128, help="image size, eight times the latent size (128)")
    parser.add_argument("--width", type=int, default=32, help="channels of the UNet's first level (32)")
    parser.add_argument("--batch", type=int, default=4, help="images per step (4)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (50)")
    parser.add_argument("--chosen", type=int, nargs="+", default=[1, 5, 10, 50], help="steps with gradient (1 5 10 50)")
    parser.add_argument("--cap", type=float, default=8.0, help="maximum GiB for autograd without checkpoints (8)")
    parser.add_argument("--replay-batch", type=int, default=5, help="calls replayed in one, in the settings (5)")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which needs a C++ compiler")
    parser.add_argument("--at", type=int, default=5, help="steps with gradient for the comparison of settings (5)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="file for the table")
    options = parser.parse_args()

    from longalign.evaluation.record import machine_text

    sizes = {key: getattr(options, key) for key in ("pixels", "width", "batch", "steps")}
    chosen = sorted({*options.chosen, options.at})
    by_steps = {k: [Setting(method, k, **sizes) for method in (BARE, PLAIN, OURS)] for k in chosen}
    default = by_steps[options.at][-1]
    small = replace(default, denoise_batch=1, decode_batch=1)
    variants = {
        "one call at a time": default,
        f"replay_batch {options.replay_batch}": replace(default, replay_batch=options.replay_batch),
        "replay keep": replace(default, replay="keep"),
        "channels last": replace(default, channels_last=True),
        **({"compiled": replace(default, compile=True)} if options.compile else {}),
        "decode_batch 1": replace(default, decode_batch=1),
        "decode_batch 1, denoise_batch 1": small,
        "the same, gradient_checkpointing": replace(small, gradient_checkpointing=True),
    }
    settings = dict.fromkeys([s for group in by_steps.values() for s in group] + list(variants.values()))
    measurements = run(list(settings), options.rounds, options.cap)

    parameters = measurements[default].parameters
    lines = [
        "# A reward step", "", f"`python benchmarks/reward_step.py{non_default_options(options, parser)}`", "",
        f"A UNet of {parameters / 1e6:.1f}M parameters with random weights and a LoRA of rank 16, "
        f"{options.batch} images of {options.pixels} x {options.pixels} pixels, {options.steps} DDIM steps with "
        f"guidance, float32. Medians of {options.rounds} round(s). Plain is autograd through the rollout. It keeps the "
        "activations of all calls with gradient. With a checkpoint for each of these calls, it keeps those of one at a "
        "time and makes the same calls as longalign. Settings that would take more than "
        f"{options.cap:g} GiB are skipped.", "",
        "Peak memory in GiB, minus the memory of the process before its first step:", "",
    ]  # fmt: skip
    head = ["steps with gradient", BARE, PLAIN, OURS, f"{OURS} / no checkpoints", f"{OURS} / checkpoints"]
    rows: dict[str, list[list[str]]] = {"memory": [], "seconds": []}
    for k, (bare, plain_, ours) in by_steps.items():
        for key, cells in rows.items():
            a, b, c = (getattr(measurements.get(s), key, None) for s in (bare, plain_, ours))
            cells.append([str(k), *("-" if v is None else f"{v:.2f}" for v in (a, b, c)), ratio(c, a), ratio(c, b)])
        rows["seconds"][-1].append(f"{measurements[ours].distance(measurements[plain_]):.1e}")
    difference = "relative difference of the gradients"
    lines += [*table(head, rows["memory"]), "Seconds:", "", *table([*head, difference], rows["seconds"])]

    lines += [f"Effect of longalign's settings with {options.at} steps that carry gradient:", ""]
    base, reference, cells = measurements[default], measurements[by_steps[options.at][1]], []
    for name, a in ((name, measurements[setting]) for name, setting in variants.items()):
        memory = [f"{a.memory:.2f}", ratio(a.memory, base.memory), ratio(a.memory, reference.memory)]
        cells.append([name, f"{a.seconds:.2f}", ratio(a.seconds, base.seconds), *memory, f"{a.distance(base):.1e}"])
    lines += table(["setting", "seconds", "ratio", "GiB", "ratio", f"GiB / {PLAIN}", difference], cells)
    lines.append(f"Machine: {machine_text()}.")
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
