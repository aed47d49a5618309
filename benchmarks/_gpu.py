"""Speed and memory on a GPU: parts of `gpu.sh`, which runs them and writes ``gpu-<device>.md`` and ``.json``.

Networks have random weights at the published sizes of Stable Diffusion 1.5 and XL, Denscore (CLIP-H) and the text
models. A reward step is the library's own, run by the training loop's optimizer step in bf16: 50 DDIM steps with
guidance, 5 of them with gradient, 480 text states, a LoRA of rank 32 in float32. The count of floating-point operations
is torch's, on meta tensors: 50 guided calls, 5 recomputed calls with their backward pass, decoder and reward forward
and backward. The share is that of the peak in `PEAK`, the data sheet's for the H100 and H200.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from _stages import DENSCORE, SD, SDXL, network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SMOKE = os.environ.get("GPU_SMOKE") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION, DTYPE = ("bf16", torch.bfloat16) if DEVICE == "cuda" else ("no", torch.float32)
ROUNDS = 1 if SMOKE else 5
PEAK = 989e12
"""Operations per second of a dense bf16 matrix product."""
TOKENS, WIDTHS = 8 if SMOKE else 480, {SD: (768, None), SDXL: (2048, 1280)}
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """One row: a training step of a model.

    Attributes:
        model: `SD` or `SDXL`.
        stage: ``reward``, ``autograd`` (a reward step by autograd through the rollout, with a checkpoint for each
            call with gradient) or ``align``.
        batch: number of images.
        channels_last: ``loop.channels_last``.
        compile: ``loop.compile``.
        solver, steps: of the rollout.
        checkpointing: ``loop.gradient_checkpointing``.
        decode_batch: number of images decoded at a time.
        dropout: ``lora.dropout``. With 0, sampling computes keys and values of the text once and merges the LoRA.
        cuda_graphs: ``loop.cuda_graphs``.
        guidance_interval: ``trainer.guidance_interval``.
    """

    model: str = SD
    stage: str = "reward"
    batch: int = 2 if SMOKE else 8
    channels_last: bool = True
    compile: Any = False
    solver: str = "ddim"
    steps: int = 4 if SMOKE else 50
    checkpointing: bool = False
    decode_batch: int | None = None
    dropout: float = 0.1
    cuda_graphs: bool = False
    guidance_interval: tuple[float, float] | None = None

    @property
    def chosen(self) -> int:
        """Number of steps with gradient."""
        return 2 if SMOKE else 5


class Results:
    """Rows of a part, written to its file as soon as they are there."""

    def __init__(self, folder: Path, part: str):
        self.file, self.rows = folder / f"{part}.json", []

    def add(self, **row: Any) -> None:
        """Adds a row, prints it and writes the file."""
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        self.rows.append(row)
        print({k: v for k, v in row.items() if k != "sample"}, flush=True)
        self.file.write_text(json.dumps(self.rows, indent=0))


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], rounds: int = 3, warmup: int = 1) -> float:
    """Median seconds of a call."""
    times = []
    for i in range(warmup + rounds):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times += [time.perf_counter() - start] if i >= warmup else []
    return statistics.median(times)


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Context manager that yields a function: peak GiB since the beginning."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def sample_of(tensor: Tensor, count: int = 64) -> list[float]:
    """``count`` evenly spaced values of a tensor, to compare two runs."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // count)][:count].float().tolist()


# Models


def make_backbone(model: str, device: str = DEVICE) -> Any:
    """A backbone in bf16."""
    from longalign.backbones.stable_diffusion.sd import SDBackbone
    from longalign.backbones.stable_diffusion.sdxl import SDXLBackbone

    kind = SDXLBackbone if model == SDXL else SDBackbone
    levels = torch.linspace(0.999, 0.005, 1000)
    parts = [network(model, name, DTYPE, device, toy=SMOKE) for name in ("UNet", "VAE")]
    return kind(*parts, levels, "epsilon")


def make_encoder(model: str, device: str = DEVICE) -> Any:
    """An encoder that returns the same states for every batch."""
    from longalign.encoders.base import Conditioning, Encoder

    width, pooled_width = WIDTHS[model]

    class Constant(Encoder):
        def encode(self, prompts: Sequence[Any]) -> Conditioning:
            generator = torch.Generator(device).manual_seed(0) if device != "meta" else None
            states = torch.randn(len(prompts), TOKENS, width, generator=generator, device=device).to(DTYPE)
            pooled = None if pooled_width is None else states[:, 0, :pooled_width]
            return Conditioning(states, pooled=pooled)

    return Constant()


@cache
def tokenizer() -> Any:
    """CLIP's tokenizer with a small vocabulary."""
    import tempfile

    from transformers import CLIPTokenizerFast

    from longalign.mini.tokenizers import write_clip_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return CLIPTokenizerFast.from_pretrained(write_clip_tokenizer(Path(folder)))


def make_reward(device: str = DEVICE) -> Any:
    """Denscore in bf16, by sentence."""
    from longalign.functional.images import ImagePreprocessor
    from longalign.rewards.clip.towers import ClipTowers
    from longalign.rewards.towers import TowerReward
    from longalign.segmenters import Sentence

    towers = ClipTowers(network(SD, DENSCORE, DTYPE, device, toy=SMOKE), tokenizer())
    return TowerReward(towers, ImagePreprocessor((224, 224)), segmenter=Sentence(), micro_batch=None, truncate=False)


def prompts_of(count: int) -> list[str]:
    """Different prompts of eight sentences."""
    sentence = "A large red circle is at the top left of a small blue square, number {}."
    return [" ".join(sentence.format(8 * i + j) for j in range(8)) for i in range(count)]


class Step:
    """A training step as the training loop runs it.

    Args:
        setting: the row.
    """

    def __init__(self, setting: Setting):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        from longalign.backbones.config import LoraConfig
        from longalign.config.sections import LoopConfig
        from longalign.loop.optimization import Optimization
        from longalign.runtime import Runtime
        from longalign.trainers.align.config import AlignConfig
        from longalign.trainers.align.trainer import AlignTrainer
        from longalign.trainers.reward.config import RewardConfig
        from longalign.trainers.reward.trainer import RewardTrainer

        self.setting = setting
        torch.manual_seed(0)
        backbone, encoder = make_backbone(setting.model), make_encoder(setting.model)
        lora, runtime = (
            LoraConfig(rank=4 if SMOKE else 32, dropout=setting.dropout, dropout_placement="up"),
            Runtime(DEVICE, str(DTYPE).removeprefix("torch.")),
        )
        parts: dict[str, Any] = {"backbone": backbone, "encoder": encoder}
        if setting.stage == "align":
            self.trainer: Any = AlignTrainer.from_config(AlignConfig(lora=lora), runtime, **parts)
        else:
            steps: Any = {"name": "grouped-random", "groups": setting.chosen}
            options: Any = {"solver": setting.solver, "num_steps": setting.steps, "decode_batch": setting.decode_batch,
                            "guidance_interval": setting.guidance_interval}  # fmt: skip
            config = RewardConfig(lora=lora, gradient_steps=steps, **options)
            self.trainer = RewardTrainer.from_config(config, runtime, **parts, rewards=[make_reward()])
        self.trainer.to(DEVICE)
        if setting.checkpointing:
            self.trainer.enable_gradient_checkpointing()
        if setting.channels_last:
            backbone.use_channels_last()
        if AcceleratorState._shared_state:
            AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision=PRECISION, cpu=DEVICE == "cpu")
        loop = LoopConfig(
            precision=PRECISION, compile=setting.compile, cuda_graphs=setting.cuda_graphs and DEVICE == "cuda"
        )
        self.optimization = Optimization(accelerator, self.trainer, loop)
        batch: dict[str, Any] = {"prompt": prompts_of(setting.batch)}
        if setting.stage == "align":
            batch["posterior"] = torch.rand(setting.batch, 8, *backbone.latent_shape()[1:])
        self.batches = itertools.repeat(batch)

    def __call__(self) -> None:
        self.trainer.train()
        if self.setting.stage != "autograd":
            self.optimization.step(self.batches)
            return
        from reward_step import plain

        plain(self.trainer, next(self.batches)["prompt"])
        self.optimization.optimizer.step()
        self.optimization.optimizer.zero_grad()


@cache
def operations(model: str, stage: str, steps: int, chosen: int) -> float:
    """Floating-point operations of a training step for each image, with guidance in all steps and without LoRA."""
    backbone, conditioning = make_backbone(model, "meta"), make_encoder(model, "meta").encode([""])
    latents = torch.empty(1, *backbone.latent_shape(), device="meta", requires_grad=True)
    backbone.denoiser.requires_grad_(False)

    def count(call: Callable[[], Tensor], backward: bool) -> float:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output = call()
            if backward:
                output.sum().backward()
        return counter.get_total_flops()

    timesteps = torch.zeros(1, device="meta", dtype=torch.long)
    call = partial(backbone.predict, latents, timesteps, conditioning)
    if stage == "align":
        return count(call, True)
    clip = network(SD, DENSCORE, DTYPE, "meta", toy=SMOKE)
    pixels = torch.empty(1, 3, 224, 224, device="meta", dtype=DTYPE, requires_grad=True)
    rewarded = count(lambda: clip.get_image_features(pixel_values=pixels).pooler_output, True)
    return (
        2 * (steps * count(call, False) + chosen * count(call, True))
        + count(lambda: backbone.decode(latents), True)
        + rewarded
    )


def measure_steps(results: Results, settings: Sequence[Setting], rounds: int = 2) -> None:
    """Adds one row for each setting. A setting that fails is a row with its error."""
    for setting in settings:
        free()
        text = dict(vars(setting))
        try:
            with peak_memory() as peak:
                start = time.perf_counter()
                step = Step(setting)
                step()
                synchronize()
                first = time.perf_counter() - start
                seconds = seconds_of(step, rounds, warmup=0)
            counted = {}
            if setting.guidance_interval is None:
                total = setting.batch * operations(setting.model, setting.stage, setting.steps, setting.chosen)
                counted = {"tflop": total / 1e12, "tflops": total / seconds / 1e12, "share": total / seconds / PEAK}
            results.add(
                **text, seconds=seconds, images_per_second=setting.batch / seconds, gib=peak(), first_seconds=first,
                **counted,
            )  # fmt: skip
        except Exception as error:
            results.add(**text, error=f"{type(error).__name__}: {str(error)[:300]}")
        step = None


# Parts


def peak(results: Results) -> None:
    """The machine: a large bf16 product and a copy."""
    side = 256 if SMOKE else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = seconds_of(lambda: a @ b, 10, 3)
    results.add(
        name=f"product of two bf16 matrices of side {side}", seconds=seconds, tflops=2 * side**3 / seconds / 1e12
    )
    big = torch.randn(2**16 if SMOKE else 2**30, device=DEVICE)
    seconds = seconds_of(lambda: big.clone(), 5, 2)
    results.add(name="copy", seconds=seconds, tb_per_second=2 * big.nbytes / seconds / 1e12)


def reward(results: Results) -> None:
    """Reward step of Stable Diffusion 1.5."""
    base = Setting()
    plain = replace(base, channels_last=False)
    fast = replace(plain, dropout=0.0)
    graphs = replace(fast, cuda_graphs=True)
    rows = [plain, fast, graphs, replace(graphs, guidance_interval=(0.28, 5.42)),
            replace(graphs, solver="dpm++", steps=4 if SMOKE else 25), base, replace(base, stage="autograd"),
            replace(plain, stage="autograd"), *(replace(graphs, batch=batch) for batch in (1, 4, 16))]  # fmt: skip
    measure_steps(results, rows[1:5:2] if SMOKE else rows, rounds=1)


def sdxl(results: Results) -> None:
    """Reward step of SDXL, align steps of both."""
    xl = Setting(model=SDXL, decode_batch=1)
    rows = [replace(xl, stage="align", batch=8), Setting(stage="align", batch=32), Setting(stage="align", batch=8),
            replace(xl, batch=1), replace(xl, batch=4), replace(xl, batch=4, stage="autograd")]  # fmt: skip
    if SMOKE:
        rows = [replace(row, batch=1) for row in rows[:1] + rows[3:4]]
    measure_steps(results, rows, rounds=1)


def compiled(results: Results) -> None:
    """Reward steps of 10 sampling steps of Stable Diffusion 1.5, compiled; the first step includes compilation."""
    base = Setting(channels_last=False, dropout=0.0, steps=4 if SMOKE else 10)
    kinds = ("aot_eager",) if SMOKE else (False, "regional", True)
    measure_steps(results, [replace(base, compile=kind) for kind in kinds])


def calls(results: Results) -> None:
    """Parts of a reward step: a guided call of the UNet without and with gradient, decoder and reward, in variants."""
    for channels_last in (False, True):
        _unet_calls(results, channels_last)
        free()
    batch, size = (2, 64) if SMOKE else (16, 512)
    reward_model, texts = make_reward(), prompts_of(batch)
    images = torch.rand(batch, 3, size, size, device=DEVICE, requires_grad=True)

    def scored() -> None:
        reward_model.score(images, texts).sum().backward()

    results.add(name="reward, forward and backward", batch=batch, seconds=seconds_of(scored, ROUNDS, 2))
    with torch.no_grad():
        seconds = seconds_of(lambda: reward_model.score(images, texts), ROUNDS, 2)
    results.add(name="reward", batch=batch, seconds=seconds, images_per_second=batch / seconds)


def _unet_calls(results: Results, channels_last: bool) -> None:
    from longalign.backbones.config import LoraConfig

    batch, backbone = 2 if SMOKE else 16, make_backbone(SD)
    if channels_last:
        backbone.use_channels_last()
    conditioning = make_encoder(SD).encode([""] * batch)
    latents = torch.randn(batch, *backbone.latent_shape(), device=DEVICE, requires_grad=True)
    timesteps = torch.full((batch,), 500, device=DEVICE)

    def predict(autocast: bool, text: Any = conditioning) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast and DEVICE == "cuda"):
            return backbone.predict(latents, timesteps, text)

    def forward(autocast: bool = False, text: Any = conditioning) -> None:
        with torch.no_grad():
            predict(autocast, text)

    def both(autocast: bool = False) -> None:
        predict(autocast).sum().backward()

    def add(name: str, call: Callable[[], None]) -> None:
        row = {"name": name, "batch": batch, "channels_last": channels_last}
        try:
            results.add(**row, seconds=seconds_of(call, ROUNDS, 2))
        except Exception as error:
            results.add(**row, error=f"{type(error).__name__}: {str(error)[:300]}")

    add("UNet", forward)
    add("UNet, autocast", partial(forward, True))
    add("UNet, forward and backward", both)
    backbone.add_lora(LoraConfig(rank=4 if SMOKE else 32, dropout=0), "x")
    add("UNet, LoRA, autocast", partial(forward, True))
    backbone.autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")
    projected = torch.no_grad()(backbone.project_text)(conditioning)
    add("UNet, LoRA, text once, autocast", partial(forward, True, projected))
    with backbone.merged_lora():
        add("UNet, LoRA merged, autocast", partial(forward, True))
        add("UNet, LoRA merged, text once, autocast", partial(forward, True, projected))
    add("UNet, LoRA, autocast, forward and backward", partial(both, True))
    nn.Module.to(backbone.denoiser, DTYPE)
    add("UNet, LoRA in bf16", forward)
    add("UNet, LoRA in bf16, forward and backward", both)
    add("decoder, forward and backward", lambda: backbone.decode(latents).sum().backward())


def profile(results: Results) -> None:
    """Kernels of a reward step of ten sampling steps, by time."""
    from torch.profiler import ProfilerActivity, profile

    step = Step(Setting(steps=4 if SMOKE else 10))
    step()
    synchronize()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities) as recorded:
        seconds = seconds_of(step, 1, 0)
    averages = recorded.key_averages()
    total = sum(event.self_device_time_total for event in averages) / 1e6
    results.add(name="all kernels", seconds=total, wall=seconds, copies=sum(
        event.count for event in averages if "Memcpy" in event.key), synchronizations=sum(
        event.count for event in averages if "Synchronize" in event.key))  # fmt: skip
    for event in sorted(averages, key=lambda event: -event.self_device_time_total)[:60]:
        results.add(name=event.key[:110], count=event.count, seconds=event.self_device_time_total / 1e6)


def encode(results: Results) -> None:
    """Encoding of 64 long prompts at the size of CLIP-L and OpenCLIP-bigG, against padding to the longest."""
    import numpy as np
    from encoding import mixed, operations_per_token, plain

    from longalign.encoders.clip.config import ClipSegmentConfig
    from longalign.encoders.clip.segment import ClipSegmentEncoder
    from longalign.segmenters import Sentence

    prompts = mixed(np.random.default_rng(0), 8 if SMOKE else 64)
    for name in ("CLIP-L text", "OpenCLIP-bigG text")[: 1 if SMOKE else 2]:
        for dtype in dict.fromkeys((DTYPE, torch.float32)):
            text_model = network(SD, name, dtype, DEVICE, toy=SMOKE)
            encoder = ClipSegmentEncoder.from_modules(ClipSegmentConfig(), text_model, tokenizer(), Sentence())
            rows = [row for plan in encoder.checked_plans(prompts) for row in plan.rows]
            total = operations_per_token(encoder, round(sum(map(len, rows)) / len(rows))) * sum(map(len, rows))
            states = encoder.encode(prompts).states
            difference = float((plain(encoder, prompts) - states).abs().max())
            ours, theirs = (
                seconds_of(partial(call, encoder, prompts), 5) for call in (lambda e, p: e.encode(p), plain)
            )
            start = time.perf_counter()
            encoder.checked_plans(prompts)
            results.add(
                name=name, dtype=str(dtype).removeprefix("torch."), prompts=len(prompts), seconds=ours, padded=theirs,
                ratio=theirs / ours, plan_seconds=time.perf_counter() - start, tflop=total / 1e12,
                tflops=total / ours / 1e12, share=total / ours / PEAK, difference=difference, sample=sample_of(states),
            )  # fmt: skip
            del encoder, text_model, states
            free()


def demo(results: Results) -> None:
    """``longalign demo``."""
    from longalign.config.changes import override
    from longalign.demo import default_config, run_demo

    folder = results.file.parent / "demo"
    short: dict[str, Any] = {"loop.steps": 1, "loop.batch_size": 2} if SMOKE else {}
    options: dict[str, Any] = {"prompts": 2, "num_steps": 2} if SMOKE else {}
    result = run_demo(folder, *(override(default_config(n), short) for n in ("align", "reward")), **options)
    for name, seconds in result.seconds.items():
        results.add(name=name, seconds=seconds)
    results.add(table=result.table.markdown())


PARTS = (peak, reward, sdxl, compiled, calls, profile, encode, demo)


def report(folder: Path) -> None:
    """Writes the tables of all parts, and their rows as one baseline."""
    from longalign.evaluation.record import machine_text

    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    rows = {part.__name__: folder / f"{part.__name__}.json" for part in PARTS}
    baseline = {name: json.loads(file.read_text()) for name, file in rows.items() if file.exists()}
    lines = [f"# {device}", "", "`benchmarks/gpu.sh`", "", f"Machine: {machine_text()}.", ""]
    for part in PARTS:
        for_part = baseline.get(part.__name__, [])
        if for_part:
            lines += [f"## {part.__name__}", "", part.__doc__ or "", ""]
        tables = [row.pop("table") for row in for_part if "table" in row]
        keys = dict.fromkeys(key for row in for_part for key in row if key != "sample")
        if keys:
            lines += [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
            lines += [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in for_part if row] + [""]
        lines += [line for table in tables for line in (table, "")]
    tests = folder / "tests.log"
    if tests.exists():
        lines += ["## tests", "", *(f"    {line}" for line in tests.read_text().splitlines()[-6:]), ""]
    name = f"gpu-{device.replace(' ', '-')}"
    (folder / f"{name}.md").write_text("\n".join(lines))
    (folder / f"{name}.json").write_text(json.dumps({"device": device, "machine": machine_text(), **baseline}))
    print(folder / f"{name}.md")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*(part.__name__ for part in PARTS), "report"])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.part == "report":
        return report(options.output)
    next(part for part in PARTS if part.__name__ == options.part)(Results(options.output, options.part))


if __name__ == "__main__":
    main()
