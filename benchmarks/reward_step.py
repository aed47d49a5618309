"""What a reward step takes, by how many sampling steps carry gradient, against plain autograd.

Plain is autograd through the whole rollout: without checkpoints, which keeps the activations of every chosen call of
the UNet, and with each chosen call in torch's checkpointing of its own, as the published code describes it. The second
holds little more than longalign, which repeats these calls itself; what can be less is a part of the batch at a time,
which autograd through one rollout cannot have. It is measured by itself, with other settings, at one number of steps.

Every measurement is a process of its own; all wait for each other and take turns, one step in each round, so that a
noisy machine disturbs them alike. Each first takes a step of a tiny model, which loads code and starts threads. Seconds
are medians over the rounds; memory is a process's peak less what it held before its first step. All gradients are
compared.

UNet, VAE and reward have random weights; guidance is on, and a LoRA is trained. Run
``python benchmarks/reward_step.py [--rounds 2] [--pixels 128] [--width 32]``; it writes a table beside itself. It takes
eight minutes on two cores with 0.13 TFLOP/s. Linux only.
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
"""Tokens of a prompt and their width."""
BARE, PLAIN, OURS = "plain, no checkpoints", "plain, checkpoints", "longalign"

SERVER = multiprocessing.get_context("forkserver")
"""Processes are forked from one that has imported everything and computed nothing."""


@dataclass(frozen=True)
class Setting:
    """One measurement: a way of computing the gradient, how many steps carry it, sizes, and settings of longalign."""

    way: str
    chosen: int
    pixels: int
    width: int
    batch: int
    steps: int
    replay_batch: int = 1
    denoise_batch: int | None = None
    decode_batch: int | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False


def build(setting: Setting) -> Any:
    """A reward trainer on random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from longalign.backbones.configs import LoraConfig
    from longalign.backbones.sd import SDBackbone
    from longalign.encoders.base import Conditioning, Encoder
    from longalign.gradient_steps.steps import GroupedRandom
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
    calls = {key: getattr(setting, key) for key in ("replay_batch", "denoise_batch", "decode_batch")}
    gradient_steps: Any = {"name": "grouped-random", "groups": setting.chosen}
    config = RewardConfig(
        lora=LoraConfig(rank=16, dropout=0), num_steps=setting.steps, gradient_steps=gradient_steps, **calls
    )
    trainer = RewardTrainer.from_config(config, backbone, Random(), [warm], GroupedRandom(setting.chosen))
    for name, parameter in trainer.named_parameters():
        if ".lora_B." in name:  # zero at first, which would leave the other factor without gradient
            torch.nn.init.normal_(parameter, std=0.01)
    if setting.gradient_checkpointing:
        trainer.enable_gradient_checkpointing()
    if setting.channels_last:
        backbone.use_channels_last()
    if setting.compile:
        backbone.wrap_denoiser(torch.compile(backbone.denoiser))
    return trainer.to("cuda" if torch.cuda.is_available() else "cpu")


def plain(trainer: Any, prompts: Sequence[str], checkpoints: bool = True) -> None:
    """The reference: autograd through the rollout, with or without a checkpoint for each chosen call."""
    import torch
    from torch.utils.checkpoint import checkpoint

    conditioning, latents, solver = trainer.encode_with_uncond(prompts), trainer.noise(len(prompts)), trainer.solver
    chosen = trainer.gradient_steps.select(len(solver)).steps
    predict = trainer.predictor(trainer.backbone.predict, conditioning, slice(0, len(prompts)))
    for index, timestep in enumerate(solver.timesteps):
        seen, timesteps = latents.detach(), torch.full((len(prompts),), timestep, device=latents.device)
        if index not in chosen:
            with torch.no_grad():
                output = predict(seen, timesteps)
        elif checkpoints:
            output = checkpoint(predict, seen, timesteps, use_reentrant=False)
        else:
            output = predict(seen, timesteps)
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
    if setting.way == OURS:
        trainer.step({"prompt": prompts}, torch.Tensor.backward)
    else:
        plain(trainer, prompts, setting.way == PLAIN)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(setting: Setting, pipe: Any) -> None:
    """A process of its own: says when it is ready, takes a step each time that it is told True and answers with its
    seconds and with the GiB at the peak so far beyond what was held before; at last the gradient and the UNet's
    parameters."""
    import torch

    tiny = replace(setting, chosen=1, pixels=64, width=32, batch=2, steps=2, compile=False)
    step(build(tiny), tiny)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed is given back, not kept for the steps that are measured
    trainer = build(setting)
    if setting.compile:
        step(trainer, setting)  # in which it is compiled
    before = _held()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pipe.send(True)
    while pipe.recv():
        pipe.send((step(trainer, setting), _peak() - before))
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in trainer.trainable()]).numpy()
    parameters = sum(p.numel() for n, p in trainer.backbone.denoiser.named_parameters() if "lora" not in n)
    pipe.send((gradient, parameters))


def _held() -> float:
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
    """A process that is under way, and what it found: ``seconds`` of its steps, ``memory`` in GiB, and at the end
    ``gradient`` and ``parameters``."""

    def __init__(self, setting: Setting):
        self.setting, self.steps, self.memory = setting, [], 0.0
        self.gradient: Any = None
        self.parameters = 0
        self.pipe, other = SERVER.Pipe()
        self.process = SERVER.Process(target=measure, args=(setting, other))
        self.process.start()
        other.close()
        self._hear()

    def _hear(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"a measurement failed: {self.setting}") from None

    def step(self) -> None:
        """Takes one step and notes its seconds."""
        self.pipe.send(True)
        seconds, self.memory = self._hear()
        self.steps.append(seconds)
        print(self.setting, f"{seconds:.2f} s, {self.memory:.2f} GiB", flush=True)

    def end(self) -> None:
        self.pipe.send(False)
        self.gradient, self.parameters = self._hear()
        self.process.join()

    @property
    def seconds(self) -> float:
        """Median of the steps."""
        return statistics.median(self.steps)

    def distance(self, other: Measurement) -> float:
        """``|a - b| / |b|`` of the gradients."""
        difference = self.gradient - other.gradient
        return float((difference @ difference) ** 0.5 / (other.gradient @ other.gradient) ** 0.5)


def expected(chosen: int, measured: Mapping[int, float]) -> float:
    """GiB that ``chosen`` graphs will take, by the line through the two largest measured numbers of them."""
    if not measured:
        return 0.0
    (most, high), *rest = sorted(measured.items(), reverse=True)
    less, low = rest[0] if rest else (0, 0.0)
    return high + (chosen - most) * (high - low) / (most - less)


def run(settings: Sequence[Setting], rounds: int, cap: float) -> dict[Setting, Measurement]:
    """Measures all settings, but not those without checkpoints that would take more than ``cap`` GiB."""
    SERVER.set_forkserver_preload(["longalign.backbones.sd", "longalign.trainers.reward"])
    found: dict[Setting, Measurement] = {}
    for setting in settings:
        graphs = {s.chosen: m.memory for s, m in found.items() if s.way == BARE}
        if setting.way == BARE and expected(setting.chosen, graphs) > cap:
            print(setting, f"left out: about {expected(setting.chosen, graphs):.1f} GiB", flush=True)
            continue
        found[setting] = Measurement(setting)
        found[setting].step()
    for _ in range(rounds - 1):
        for measurement in found.values():
            measurement.step()
    for measurement in found.values():
        measurement.end()
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, with an empty one after it."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def given(options: argparse.Namespace, parser: argparse.ArgumentParser, skipped: Sequence[str] = ()) -> str:
    """The options that are not the defaults, as they were given."""
    found = ""
    for key, value in vars(options).items():
        if value != parser.get_default(key) and key not in ("output", *skipped):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words = (f"{v:g}" if isinstance(v, float) else str(v) for v in values)
            found += " ".join([f" --{key.replace('_', '-')}", *words])
    return found


def ratio(a: float, b: float | None) -> str:
    return "-" if b is None else f"{a / b:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=128, help="of the images, eight times those of the latents (128)")
    parser.add_argument("--width", type=int, default=32, help="channels of the UNet's first level (32)")
    parser.add_argument("--batch", type=int, default=4, help="images in a step (4)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (50)")
    parser.add_argument(
        "--chosen", type=int, nargs="+", default=[1, 5, 10, 50], help="of them with gradient (1 5 10 50)"
    )
    parser.add_argument("--cap", type=float, default=8.0, help="GiB that autograd without checkpoints may take (8)")
    parser.add_argument("--replay-batch", type=int, default=5, help="calls repeated in one, for the settings (5)")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile, which needs a C++ compiler here")
    parser.add_argument("--at", type=int, default=5, help="steps with gradient for the settings (5)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="of the table")
    options = parser.parse_args()

    from longalign.record import machine_text

    sizes = {key: getattr(options, key) for key in ("pixels", "width", "batch", "steps")}
    chosen = sorted({*options.chosen, options.at})
    ways = {k: [Setting(way, k, **sizes) for way in (BARE, PLAIN, OURS)] for k in chosen}
    first = ways[options.at][-1]
    small = replace(first, denoise_batch=1, decode_batch=1)
    variants = {
        "one call at a time": first,
        f"replay_batch {options.replay_batch}": replace(first, replay_batch=options.replay_batch),
        "channels last": replace(first, channels_last=True),
        **({"compiled": replace(first, compile=True)} if options.compile else {}),
        "decode_batch 1": replace(first, decode_batch=1),
        "decode_batch 1, denoise_batch 1": small,
        "the same, gradient_checkpointing": replace(small, gradient_checkpointing=True),
    }
    settings = dict.fromkeys([s for three in ways.values() for s in three] + list(variants.values()))
    found = run(list(settings), options.rounds, options.cap)

    lines = [
        "# A reward step", "", f"`python benchmarks/reward_step.py{given(options, parser)}`", "",
        f"A UNet of {found[first].parameters / 1e6:.1f}M parameters with random weights and a LoRA of rank 16, "
        f"{options.batch} images of {options.pixels} x {options.pixels} pixels, {options.steps} DDIM steps with "
        f"guidance, float32. Medians of {options.rounds} round(s). Plain is autograd through the rollout: it keeps the "
        "activations of all calls with gradient, or, with a checkpoint for each of them, those of one at a time, and "
        f"then it makes the same calls as longalign. Left out is what would take more than {options.cap:g} GiB.", "",
        "Peak memory in GiB, beyond what the process held before its first step:", "",
    ]  # fmt: skip
    head = ["steps with gradient", BARE, PLAIN, OURS, f"{OURS} / no checkpoints", f"{OURS} / checkpoints"]
    rows: dict[str, list[list[str]]] = {"memory": [], "seconds": []}
    for k, (bare, plain_, ours) in ways.items():
        for key, cells in rows.items():
            a, b, c = (getattr(found.get(s), key, None) for s in (bare, plain_, ours))
            cells.append([str(k), *("-" if v is None else f"{v:.2f}" for v in (a, b, c)), ratio(c, a), ratio(c, b)])
        rows["seconds"][-1].append(f"{found[ours].distance(found[plain_]):.1e}")
    last = "relative difference of the gradients"
    lines += [*table(head, rows["memory"]), "Seconds:", "", *table([*head, last], rows["seconds"])]

    lines += [f"What settings of longalign change with {options.at} steps that carry gradient:", ""]
    base, reference, cells = found[first], found[ways[options.at][1]], []
    for name, a in ((name, found[setting]) for name, setting in variants.items()):
        memory = [f"{a.memory:.2f}", ratio(a.memory, base.memory), ratio(a.memory, reference.memory)]
        cells.append([name, f"{a.seconds:.2f}", ratio(a.seconds, base.seconds), *memory, f"{a.distance(base):.1e}"])
    lines += table(["setting", "seconds", "ratio", "GiB", "ratio", f"GiB / {PLAIN}", last], cells)
    lines.append(f"Machine: {machine_text()}.")
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
