"""How much GPU memory Stable Diffusion 1.5 and XL take in each stage, computed without a GPU.

The networks have their published sizes and no weights: all tensors are torch's meta tensors, which have a shape and no
content. Trainers, LoRA, reward and sampling are the library's own. What they allocate and free is counted operation by
operation, forward and backward, so the peak is that of the tensors to the byte. How such a count agrees with what
torch's profiler measures is tried on a small UNet on the CPU.

Run ``python benchmarks/memory.py``; it writes a table beside itself and takes about four minutes on one slow core.
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
    """GiB of ``weights``, of the optimiser's ``state``, at the ``peak``, and of the ``graph`` of one call where the
    stage is ``plain``."""
    with LikeCuda() as cuda:
        parts, trained, run = stage(setting, cuda)
        with Live() as live:
            live.hold([[*part.parameters(), *part.buffers()] for part in parts])
            found = {"weights": live.now}
            optimizer = torch.optim.AdamW(trained, foreach=True) if trained else None  # as it is by itself on CUDA
            for p in trained:
                moments = {key: torch.empty_like(p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros(()), **moments}
            found["state"] = live.now - found["weights"]
            live.peak = live.now
            found["graph"] = run(live)
            if optimizer is not None:
                torch.nn.utils.clip_grad_norm_(trained, 0.3)
                optimizer.step()
            found["peak"] = live.peak
    return {key: value / GIB for key, value in found.items()}


def checked() -> tuple[float, float]:
    """MiB at the peak of a step of a small UNet with a LoRA, beyond its weights: counted on meta tensors, and measured
    by torch's profiler on the CPU."""
    from diffusers import UNet2DConditionModel

    from longalign.backbones.lora import LoraConfig, inject_lora

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
        held = live.now
        step()
    _, step = small("cpu")
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    return (live.peak - held) / 2**20, max(accumulate(size for *_, size in changes)) / 2**20


LABELS = {
    "texts": "encode prompts", "images": "encode images", "align": "align step", "reward": "reward step",
    "plain": "reward step by autograd through the sampling", "generate": "draw images",
}  # fmt: skip


def rows(model: str) -> list[Setting]:
    """What is asked of a model."""
    of, batch = partial(Setting, model), 8 if model == SD else 4
    return [
        of("texts", 16), of("images", 16), of("align"), of("align", batch), of("align", batch, checkpointing=True),
        of("align", batch, "float32", checkpointing=True), of("align", batch, lora=False, checkpointing=True),
        of("reward"), of("reward", 4), of("reward", 4, checkpointing=True),
        of("reward", 4, checkpointing=True, single=True), of("plain"), of("generate"), of("generate", 8),
    ]  # fmt: skip


def recipe(path: Path) -> dict[str, float]:
    """As `measure`, and ``batch``, of an example's config without caches: text models are in memory, and images are
    encoded too."""
    from longalign import load_config

    config: Any = load_config(path)
    model = {"sd": SD, "sdxl": SDXL}[config.backbone.name]
    stage, batch = config.trainer.name, config.loop.batch_size
    checkpointing = config.loop.gradient_checkpointing
    found = measure(Setting(model, stage, batch, config.backbone.dtype, checkpointing=checkpointing))
    rest = found["peak"] - found["weights"] - found["state"]
    if stage == "align":
        images = measure(Setting(model, "images", batch))
        rest = max(rest, images["peak"] - images["weights"])
    found["weights"] += measure(Setting(model, "texts"))["weights"]
    return {**found, "peak": found["weights"] + found["state"] + rest, "batch": batch}


def recipes() -> list[str]:
    """The table of the examples for GPUs of 24 GB."""
    lines = [
        "## Examples for one GPU of 24 GB", "",
        "Batch and settings are those of the files in `examples/`; text models are in memory, nothing is cached.", "",
        "| example | batch | weights | AdamW's state | all else at the peak | peak |", "|---" * 6 + "|",
    ]  # fmt: skip
    for path in sorted((Path(__file__).parents[1] / "examples").glob("*-24gb.yaml")):
        found = recipe(path)
        lines.append(f"| `{path.name}` | {found['batch']} | {columns(found)} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def columns(found: dict[str, float]) -> str:
    """The last columns of a row."""
    rest = found["peak"] - found["weights"] - found["state"]
    return " | ".join(f"{n:.1f}" for n in (found["weights"], found["state"], rest, found["peak"]))


def described(setting: Setting, calls: int) -> str:
    """The first columns of a row."""
    trains = setting.stage in ("align", "reward", "plain")
    words = [("LoRA" if setting.lora else "all weights")] if trains else []
    words += ["gradient checkpointing"] * setting.checkpointing + ["one image at a time"] * setting.single
    words += [f"`backbone.dtype: {setting.unet}`"] * (setting.unet != "bfloat16")
    words += [f"{calls} steps with gradient"] * (setting.stage == "plain")
    return f"{LABELS[setting.stage]} | {setting.batch} | {', '.join(words)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    counted, measured = checked()
    lines = [
        "# GPU memory of each stage", "", "`python benchmarks/memory.py`", "",
        "Computed, not measured on a GPU: the most bytes of tensors at any time of a stage, in GiB. Scratch space of "
        "kernels, the allocator's rounding and gaps, and the CUDA context (about half a GiB) come on top.", "",
        "Images of 512 x 512 pixels for Stable Diffusion 1.5 and of 1024 x 1024 for Stable Diffusion XL, "
        "`loop.precision: bf16`, `backbone.dtype: bfloat16`, LoRAs of rank 32, prompts of 240 tokens, `reward` with "
        "Denscore and guidance; prompts and latents cached, so that no text model is in memory while training. Samples "
        "are drawn in one step here; each further one that carries gradient keeps a latent, at most 256 KiB. With all "
        "weights the peak is in AdamW's own step, which makes a copy of their size.", "",
        f"A step of a small UNet with a LoRA on the CPU takes {measured:.1f} MiB beyond its weights by torch's "
        f"profiler; counted in this way it is {counted:.1f} MiB.", "",
    ]  # fmt: skip
    for model in (SD, SDXL):
        lines += [
            f"## {model}", "",
            "| part | parameters | GiB in bf16 | in fp32 | in fp32 with gradient and AdamW's state |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for name in ("UNet", "VAE", *TEXTS[model], *(["adapter"] if model == SD else []), DENSCORE):
            count = sum(p.numel() for p in network(model, name).parameters())
            sizes = " | ".join(f"{count * size / GIB:.2f}" for size in (2, 4, 16))
            lines.append(f"| {name} | {count:,} | {sizes} |")
        lines += ["", "| stage | batch | | weights | AdamW's state | all else at the peak | peak |", "|---" * 7 + "|"]
        for setting in rows(model):
            found, calls = measure(setting), 5
            found["peak"] += (calls - 1) * found["graph"]  # each further call keeps one graph more
            lines.append(f"| {described(setting, calls)} | {columns(found)} |")
            print(lines[-1], flush=True)
        lines.append("")
    lines += recipes()
    Path(__file__).with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
