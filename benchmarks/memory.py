"""GPU memory of Stable Diffusion 1.5 and XL in each stage, computed without a GPU.

The networks have their published sizes and no weights: all tensors are torch's meta tensors, which have a shape and no
values. Trainers, LoRA, reward and sampling are the library's own. Allocations are counted operation by operation,
forward and backward, so the peak is that of the tensors to the byte. The count is compared with torch's profiler on a
small UNet on the CPU.

Run ``python benchmarks/memory.py``. It writes a table next to itself and takes about four minutes on one slow core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from _live import LikeCuda, Live
from _stages import DENSCORE, SD, SDXL, TEXTS, Setting, network, stage

GIB = 2**30


def measure(setting: Setting) -> dict[str, float]:
    """GiB of a stage.

    Returns:
        ``weights``, the optimizer ``state``, the ``peak``, and the ``graph`` of one call if the stage is ``plain``.
    """
    with LikeCuda() as cuda:
        modules, trainable, run = stage(setting, cuda)
        with Live() as live:
            live.hold([[*module.parameters(), *module.buffers()] for module in modules])
            memory = {"weights": live.now}
            optimizer = torch.optim.AdamW(trainable, foreach=True) if trainable else None  # CUDA's default
            for p in trainable:
                moments = {key: torch.empty_like(p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros(()), **moments}
            memory["state"] = live.now - memory["weights"]
            live.peak = live.now
            memory["graph"] = run(live)
            if optimizer is not None:
                torch.nn.utils.clip_grad_norm_(trainable, 0.3)
                optimizer.step()
            memory["peak"] = live.peak
    return {key: value / GIB for key, value in memory.items()}


def compare_with_profiler() -> tuple[float, float]:
    """Peak MiB of a step of a small UNet with a LoRA, without its weights.

    Returns:
        The count on meta tensors, and the measurement of torch's profiler on the CPU.
    """
    from diffusers import UNet2DConditionModel

    from longalign.backbones.config import LoraConfig
    from longalign.backbones.lora import inject_lora

    def small(device: str) -> tuple[Any, Callable[[], None]]:
        with torch.device(device):
            sizes = {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": 8}
            unet = UNet2DConditionModel(sample_size=32, **sizes)
            inject_lora(unet, LoraConfig(rank=8, dropout_placement="up"), "x")

        def step() -> None:
            shapes = ((4, 4, 32, 32), (4,), (4, 77, 64))
            unet(*(torch.zeros(shape, device=device) for shape in shapes))[0].square().mean().backward()

        return unet, step

    unet, step = small("meta")
    with LikeCuda(), Live() as live:
        live.hold([*unet.parameters(), *unet.buffers()])
        weights = live.now
        step()
    _, step = small("cpu")
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    return (live.peak - weights) / 2**20, max(accumulate(size for *_, size in changes)) / 2**20


LABELS = {
    "texts": "encode prompts", "images": "encode images", "align": "align step", "reward": "reward step",
    "plain": "reward step by autograd through the sampling", "generate": "generate images",
}  # fmt: skip


def rows(model: str) -> list[Setting]:
    """The table rows of a model."""
    row, batch = partial(Setting, model), 8 if model == SD else 4
    return [
        row("texts", 16), row("images", 16), row("align"), row("align", batch), row("align", batch, checkpointing=True),
        row("align", batch, "float32", checkpointing=True), row("align", batch, lora=False, checkpointing=True),
        row("reward"), row("reward", 4), row("reward", 4, checkpointing=True),
        row("reward", 4, checkpointing=True, single=True), row("plain"), row("generate"), row("generate", 8),
    ]  # fmt: skip


def measure_example(path: Path) -> dict[str, float]:
    """Like `measure`, plus ``batch``, for an example config without caches.

    The text models are in memory, and images are encoded in the step.
    """
    from longalign import load_config

    config: Any = load_config(path)
    model = {"sd": SD, "sdxl": SDXL}[config.backbone.name]
    stage, batch = config.trainer.name, config.loop.batch_size
    checkpointing = config.loop.gradient_checkpointing
    memory = measure(Setting(model, stage, batch, config.backbone.dtype, checkpointing=checkpointing))
    rest = memory["peak"] - memory["weights"] - memory["state"]
    if stage == "align":
        images = measure(Setting(model, "images", batch))
        rest = max(rest, images["peak"] - images["weights"])
    memory["weights"] += measure(Setting(model, "texts"))["weights"]
    return {**memory, "peak": memory["weights"] + memory["state"] + rest, "batch": batch}


def example_table() -> list[str]:
    """The table of the examples for one GPU of 24 GB."""
    lines = [
        "## Examples for one GPU of 24 GB", "",
        "Batch and settings are those of the files in `examples/`. Text models are in memory, nothing is cached.", "",
        "| example | batch | weights | AdamW's state | other at the peak | peak |", "|---" * 6 + "|",
    ]  # fmt: skip
    for path in sorted((Path(__file__).parents[1] / "examples").glob("*-24gb.yaml")):
        memory = measure_example(path)
        lines.append(f"| `{path.name}` | {memory['batch']} | {columns(memory)} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def columns(memory: dict[str, float]) -> str:
    """The memory columns of a row."""
    rest = memory["peak"] - memory["weights"] - memory["state"]
    return " | ".join(f"{n:.1f}" for n in (memory["weights"], memory["state"], rest, memory["peak"]))


def describe_setting(setting: Setting, calls: int) -> str:
    """The setting columns of a row."""
    trains = setting.stage in ("align", "reward", "plain")
    words = [("LoRA" if setting.lora else "all weights")] if trains else []
    words += ["gradient checkpointing"] * setting.checkpointing + ["one image at a time"] * setting.single
    words += [f"`backbone.dtype: {setting.unet}`"] * (setting.unet != "bfloat16")
    words += [f"{calls} steps with gradient"] * (setting.stage == "plain")
    return f"{LABELS[setting.stage]} | {setting.batch} | {', '.join(words)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    counted, measured = compare_with_profiler()
    lines = [
        "# GPU memory of each stage", "", "`python benchmarks/memory.py`", "",
        "Computed, not measured on a GPU: the peak bytes of all tensors in a stage, in GiB. Scratch space of kernels, "
        "the allocator's rounding and fragmentation, and the CUDA context (about half a GiB) come on top.", "",
        "Images have 512 x 512 pixels for Stable Diffusion 1.5 and 1024 x 1024 for Stable Diffusion XL. Settings: "
        "`loop.precision: bf16`, `backbone.dtype: bfloat16`, LoRAs of rank 32, prompts of 240 tokens, `reward` with "
        "Denscore and guidance. Prompts and latents are cached, so no text model is in memory while training. Images "
        "are sampled in one step here. Each further step that carries gradient keeps a latent, at most 256 KiB. When "
        "all weights are trained, the peak is in AdamW's step, which makes a copy of their size.", "",
        f"A step of a small UNet with a LoRA on the CPU takes {measured:.1f} MiB in addition to its weights, measured "
        f"by torch's profiler. The count is {counted:.1f} MiB.", "",
    ]  # fmt: skip
    for model in (SD, SDXL):
        lines += [
            f"## {model}", "",
            "| network | parameters | GiB in bf16 | in fp32 | in fp32 with gradient and AdamW's state |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for name in ("UNet", "VAE", *TEXTS[model], *(["adapter"] if model == SD else []), DENSCORE):
            count = sum(p.numel() for p in network(model, name).parameters())
            sizes = " | ".join(f"{count * size / GIB:.2f}" for size in (2, 4, 16))
            lines.append(f"| {name} | {count:,} | {sizes} |")
        lines += ["", "| stage | batch | | weights | AdamW's state | other at the peak | peak |", "|---" * 7 + "|"]
        for setting in rows(model):
            memory, calls = measure(setting), 5
            memory["peak"] += (calls - 1) * memory["graph"]  # each further call keeps one more graph
            lines.append(f"| {describe_setting(setting, calls)} | {columns(memory)} |")
            print(lines[-1], flush=True)
        lines.append("")
    lines += example_table()
    Path(__file__).with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
