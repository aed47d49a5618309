"""Stable Diffusion 1.5 with LongAlign's models, at full size with random weights, on the CPU.

Every model has the published size and layout: the UNet, VAE and text model of SD 1.5, T5-large with LaVi-Bridge's
adapter, Denscore (a CLIP ViT-H/14). The models are written once. Then the commands of the README run on them, each in
its own process. Time and peak memory are measured for: encode, one align step, one reward step, checkpoint, reload,
generate, and the exported LoRA in plain diffusers.

Run ``python benchmarks/full_size.py [--size 256] [--folder runs/full-size]``. It writes a table next to itself and
needs 8 GiB of disk, and 20 GiB of memory at 256 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
CAPTION = "A quiet harbour lies in the morning fog. Three boats with red sails are tied to a wooden pier. " * 6

ENCODE = """
import json, sys, time
import torch
from longalign.config.changes import override
from longalign.runtime import Runtime
config = override(sys.argv[1], json.loads(sys.argv[2]))
encoder = config.encoder.build(Runtime.detect())
prompts = [json.loads(line)["prompt"] for line in open(sys.argv[3])]
with torch.no_grad():
    start = time.perf_counter()
    states = encoder.encode(prompts).states
print(json.dumps({"shape": list(states.shape), "seconds": time.perf_counter() - start}))
"""

PLAIN = """
import sys
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.load_lora_weights(sys.argv[2])
image = pipe("A quiet harbour.", num_inference_steps=2, height=int(sys.argv[3]), width=int(sys.argv[3])).images[0]
print(image.size, sorted(pipe.get_active_adapters()))
"""


def write_models(folder: Path) -> dict[str, int]:
    """Writes checkpoints with random weights in half precision; returns their parameter counts."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
    )

    from longalign.encoders.t5.adapter import TextAdapter
    from longalign.mini.tokenizers import write_clip_tokenizer, write_t5_tokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(write_clip_tokenizer(folder / "tokenizer"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            **ends,
        )
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    counts = {"UNet": unet, "VAE": vae, "CLIP-L text": text}
    pipe = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "sd15")

    counts["T5-large encoder"] = t5 = T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=1024,
            d_kv=64,
            d_ff=4096,
            num_layers=24,
            num_heads=16,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    t5.half().save_pretrained(folder / "t5-large")
    write_t5_tokenizer(folder / "t5-large", [CAPTION] * 20)
    counts["adapter"] = adapter = TextAdapter(1024, 896, 768)
    adapter.save(folder / "lavi" / "t5_unet" / "adapter")

    text_config = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", **ends,
    }  # fmt: skip
    vision_config = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "gelu",
    }  # fmt: skip
    counts["Denscore (CLIP-H)"] = clip = CLIPModel(
        CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=1024)
    )
    clip.half().save_pretrained(folder / "denscore")
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder / "denscore")
    return {name: sum(p.numel() for p in model.parameters()) for name, model in counts.items()}


def write_data(folder: Path, size: int) -> None:
    """Writes four images with a long caption each, and a file of prompts."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows, prompts = [], []
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        caption = f"Picture number {i} of the harbour. {CAPTION}".strip()
        rows.append({"file_name": f"{i}.png", "text": caption})
        prompts.append({"prompt": caption})
    for path, lines in ((folder / "images" / "metadata.jsonl", rows), (folder / "prompts.jsonl", prompts)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its seconds and peak GiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def step_seconds(run: Path) -> float:
    """Seconds of the run's only step."""
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="image size in pixels (256)")
    parser.add_argument("--folder", type=Path, default=Path("runs/full-size"), help="folder for the models and runs")
    options = parser.parse_args()
    size, folder = options.size, options.folder
    models, sd15 = folder / "models", str(folder / "models" / "sd15")
    if not (models / "counts.json").exists():
        # in a process of its own: the peak memory of a child process is at least that of its parent when it starts
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            counts = pool.submit(write_models, models).result()
        (models / "counts.json").write_text(json.dumps(counts))
    counts = json.loads((models / "counts.json").read_text())
    write_data(folder, size)
    for run in ("align", "reward", "out", "export"):
        shutil.rmtree(folder / run, ignore_errors=True)

    local = {
        "backbone.checkpoint": sd15,
        "encoder.parts.0.checkpoint": sd15,
        "encoder.parts.1.checkpoint": str(models / "t5-large"),
        "encoder.parts.1.adapter.checkpoint": str(models / "lavi"),
    }
    short = {"loop.steps": 1, "loop.accumulation": 1, "loop.warmup": 0, "loop.precision": "no", "loop.workers": 0}
    align = {**local, **short, "loop.batch_size": 1, "data.folder": str(folder / "images"), "data.resolution": size}
    reward = {
        **local, **short, "loop.batch_size": 2, "data.file": str(folder / "prompts.jsonl"),
        "rewards.0.inner.checkpoint": str(models / "denscore"), "rewards.0.inner.crop": size - 8,
        "trainer.resolution": size, "trainer.num_steps": 4, "trainer.gradient_steps.groups": 2,
        "init_from": str(folder / "align"),
    }  # fmt: skip
    python, longalign = sys.executable, [sys.executable, "-m", "longalign"]

    def train(example: str, changes: dict, output: Path) -> list[str]:
        pairs = [f"{key}={value}" for key, value in {**changes, "output": output}.items()]
        return [*longalign, "train", str(ROOT / "examples" / example), *pairs]

    example = str(ROOT / "examples" / "longalign-sd15-align.yaml")
    prompts, pixels = str(folder / "prompts.jsonl"), str(size)
    sampling = ["--prompts", prompts, "--num-steps", "2", "--size", pixels, "--batch", "1"]
    stages = {
        "encode 4 captions of 120 words": [python, "-c", ENCODE, example, json.dumps(local), prompts],
        "one align step, batch 1, checkpoint": train("longalign-sd15-align.yaml", align, folder / "align"),
        "one reward step, batch 2, 4 sampling steps of which 2 carry gradient, checkpoint": train(
            "longalign-sd15-reward.yaml", reward, folder / "reward"
        ),
        "reload and generate 4 images, 2 steps": [
            *longalign, "generate", "--checkpoint", str(folder / "reward"), *sampling, "--output", str(folder / "out"),
        ],
        "export for diffusers": [
            *longalign, "export", str(folder / "reward"), str(folder / "export"),
        ],
        "the exported LoRA in plain diffusers, 1 image, 2 steps": [
            python, "-c", PLAIN, sd15, str(folder / "export"), pixels,
        ],
    }  # fmt: skip
    rows = []
    for name, command in stages.items():
        print(f"== {name}", flush=True)
        seconds, peak = measure(command)
        run = {"one align": folder / "align", "one rewar": folder / "reward"}.get(name[:9])
        in_step = f"{step_seconds(run):.1f}" if run else ""
        rows.append((name, f"{seconds:.1f}", in_step, f"{peak:.1f}"))
        print(*rows[-1], sep=" | ", flush=True)

    # imports torch, whose memory would count in the stages
    from longalign.evaluation.record import machine_text

    lines = [
        "# Stable Diffusion 1.5 at full size on the CPU", "", f"`python benchmarks/full_size.py --size {size}`", "",
        f"Random weights, float32, {size} x {size} pixels; each row is a separate process, including loading.", "",
        "| stage | seconds | seconds from the start of the first step | peak memory, GiB |", "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows), "", "Parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items()) + ".",
    ]  # fmt: skip
    lines += [f"Machine: {machine_text()}."]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
