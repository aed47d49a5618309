"""Speed of scoring, of align steps with and without caches, and of all steps by prompt length and batch size.

The models are a Stable Diffusion of a fifth of the width and half the depth, and a preference model of CLIP-B/32's
sizes, both with random weights. Compared methods run in sequence in each round, so that noise of the machine affects
them equally. Medians are reported. The plain methods pad all segments to the longest and merge them in a Python loop
(`encoding.py`), and use autograd through the rollout with a checkpoint per call with gradient (`reward_step.py`).

Run ``python benchmarks/training.py [--rounds 2]``. It writes a table next to itself and takes five minutes on two cores
with 0.13 TFLOP/s. ``--tiny`` is a smoke test.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import encoding
import numpy as np
import reward_step
import torch
from encoding import medians
from PIL import Image
from reward_step import table
from torch import Tensor
from torch.nn import functional as F

from longalign.caching import precompute as caching
from longalign.compose import build_from_config
from longalign.config.changes import override
from longalign.evaluation.record import machine_text
from longalign.loop.batches import load_batches, plan_batches
from longalign.mini.tokenizers import write_clip_tokenizer
from longalign.registry import rewards
from longalign.rewards.towers import TowerReward
from longalign.runtime import Runtime

FULL: dict[str, Any] = {
    "pixels": 256, "unet": (64, 128, 256, 256), "vae": (32, 64, 128, 128), "text": (6, 256), "reward pixels": 128,
    "encoder": (12, 768), "reward text": (12, 512), "reward image": (12, 768), "lengths": (20, 77, 150, 300, 500),
    "batches": (1, 2, 4, 8),
}  # fmt: skip
TINY: dict[str, Any] = {
    "pixels": 128, "unet": (32, 32, 32, 32), "vae": (32, 32, 32, 32), "text": (1, 64), "reward pixels": 128,
    "encoder": (1, 64), "reward text": (1, 64), "reward image": (1, 64), "lengths": (20, 100), "batches": (1, 2),
}  # fmt: skip
CAPTION, IMAGES, BATCH = 200, 16, 4
"""Tokens of a caption, number of images, and images per step, in the comparison of caches."""
SAMPLING, CHOSEN = 4, 2
"""Sampling steps of a reward step, and how many of them carry gradient."""


def prompts(tokens: int, count: int, seed: int = 0) -> list[str]:
    """Samples prompts of ``tokens`` tokens without special ones. Each word and each full stop is one token."""
    rng = np.random.default_rng([seed, tokens])
    return [" ".join(_sentences(rng, tokens)) for _ in range(count)]


def _sentences(rng: np.random.Generator, tokens: int) -> Iterable[str]:
    while tokens > 0:
        words = tokens - 1 if tokens < 30 else int(rng.integers(8, 23))
        yield " ".join(rng.choice(encoding.WORDS.split(), words)) + "."
        tokens -= words + 1


def no_grad(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a call in `torch.no_grad`."""
    return torch.no_grad()(call)


def write_models(folder: Path, size: Mapping[str, Any]) -> tuple[str, str, int]:
    """Writes a Stable Diffusion and a CLIP model; returns their folders and the parameter count of the UNet."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizerFast

    write_clip_tokenizer(folder / "clip", encoding.WORDS.split())
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "clip")
    unet = UNet2DConditionModel(
        sample_size=size["pixels"] // 8, cross_attention_dim=size["text"][1], attention_head_dim=8,
        block_out_channels=size["unet"], layers_per_block=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=size["vae"], layers_per_block=1, latent_channels=4, sample_size=size["pixels"],
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    levels = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    text = CLIPTextModel(encoding.text_config(*size["text"], tokenizer))
    StableDiffusionPipeline(
        vae, text, tokenizer, unet, levels, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder / "sd")

    layers, width = size["reward image"]
    image = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "image_size": 224, "patch_size": 32,
    }  # fmt: skip
    text_config = encoding.text_config(*size["reward text"], tokenizer).to_dict()
    CLIPModel(CLIPConfig(text_config=text_config, vision_config=image, projection_dim=512)).save_pretrained(
        folder / "clip"
    )
    normal = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(normal))
    return str(folder / "sd"), str(folder / "clip"), sum(p.numel() for p in unet.parameters())


def write_images(folder: Path, pixels: int) -> str:
    """Writes images with long captions in the format of the data kind ``folder``."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as rows:
        for i, caption in enumerate(prompts(CAPTION, IMAGES)):
            Image.fromarray(rng.integers(0, 256, (pixels, pixels, 3), np.uint8)).save(folder / f"{i}.jpg")
            rows.write(json.dumps({"file_name": f"{i}.jpg", "text": caption}) + "\n")
    return str(folder)


def make_step(config: Any) -> Callable[[], None]:
    """Returns a function that runs one training step on the run's data, including the optimizer."""
    composition = build_from_config(config, Runtime())
    trainer, size = composition.trainer.train(), config.loop.batch_size
    optimizer = torch.optim.AdamW(trainer.trainable(), config.loop.lr)
    batches = load_batches(composition.data, plan_batches(composition.data, size, 0, 0, 0, 1), trainer.needs_images, 0)

    def step() -> None:
        trainer.step(next(batches), Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()

    return step


def caches(rounds: int, config: Any, folder: Path) -> list[str]:
    """Times an align step without a cache, with each cache, and with both."""
    kinds = {
        "nothing": None,
        "text states": {"folder": str(folder), "latents": False},
        "latents": {"folder": str(folder), "prompts": False},
        "both": {"folder": str(folder)},
    }
    configs = {kind: override(config, {"cache": cache}) for kind, cache in kinds.items()}
    start = time.perf_counter()
    caching.make_caches(configs["both"], Runtime())
    per_image = (time.perf_counter() - start) / IMAGES
    times = medians(rounds, {kind: make_step(config) for kind, config in configs.items()})
    saved = (times["nothing"] - times["both"]) / BATCH
    rows = [[kind, f"{seconds:.2f}", f"{seconds / times['nothing']:.2f}"] for kind, seconds in times.items()]
    return [
        f"An align step with {BATCH} images and captions of {CAPTION} tokens. The runs differ only in the cache:", "",
        *table(["cached", "seconds", "ratio"], rows),
        f"Making both caches took {per_image:.2f} s per image. A step with both saves {saved:.2f} s per image.", "",
    ]  # fmt: skip


@torch.no_grad()
def plain_scores(reward: TowerReward, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Reference: scores by segments, padded to the longest and averaged prompt by prompt."""
    split = [reward.segments(text) for text in texts]
    unit = F.normalize(reward.towers.embed_texts([s for segments in split for s in segments]), dim=-1)
    means = [part.mean(0) for part in unit.split([len(segments) for segments in split])]
    return (reward.image_features(images) * torch.stack(means)).sum(-1)


def scoring(rounds: int, clip: str, count: int, pixels: int) -> tuple[list[str], TowerReward]:
    """Images that a preference model scores per second. Also returns the model."""
    config = {"name": "denscore", "checkpoint": clip}
    whole, segments = (rewards.build({**config, "text": text}) for text in ("whole", "segments"))
    images, texts = torch.rand(count, 3, pixels, pixels), encoding.mixed(np.random.default_rng(1), count)
    calls = {
        "text whole": lambda: no_grad(whole.score)(images, texts),
        "text by segments": lambda: no_grad(segments.score)(images, texts),
        "text by segments, plain": lambda: plain_scores(segments, images, texts),
        "text by segments, with the images' gradient": lambda: (
            segments.score(images.clone().requires_grad_(), texts).sum().backward()
        ),
        "image tower alone": lambda: no_grad(segments.image_features)(images),
    }
    rows = [[key, f"{count / value:.1f}"] for key, value in medians(rounds, calls).items()]
    intro = f"CLIP-B/32's sizes, {count} images of {pixels} pixels, prompts of 3 to 12 sentences of 6 to 40 words:"
    return [intro, "", *table(["method", "images per second"], rows)], segments


def growth(
    rounds: int, trainers: Mapping[str, Any], encoder: Any, reward: TowerReward, size: Mapping[str, Any]
) -> list[str]:
    """Seconds of each operation by prompt length and by batch size."""
    pixels = size["pixels"]

    def calls(tokens: int, count: int) -> dict[str, Callable[[], object]]:
        texts, images = prompts(tokens, count, seed=1), torch.rand(count, 3, pixels, pixels)
        batch = {"prompt": texts, "image": images}
        return {
            "encoding, plain": lambda: encoding.plain(encoder, texts),
            "encoding": lambda: no_grad(encoder.encode)(texts),
            "scoring": lambda: no_grad(reward.score)(images, texts),
            "align step": lambda: trainers["align"].step(batch, Tensor.backward),
            "reward step, plain": lambda: reward_step.plain(trainers["reward"], texts),
            "reward step": lambda: trainers["reward"].step({"prompt": texts}, Tensor.backward),
        }

    points = [("length", n, calls(n, 1)) for n in size["lengths"]]
    points += [("batch", n, calls(77, n)) for n in size["batches"]]
    times = medians(rounds, {(by, n, name): call for by, n, group in points for name, call in group.items()})
    names = list(points[0][2])
    lines = [
        f"Seconds. Encoding uses a CLIP text model of {size['encoder'][0]} layers of width {size['encoder'][1]}. A "
        f"reward step has {size['reward pixels']} pixels and {SAMPLING} sampling steps, {CHOSEN} of them with "
        "gradient. The conditioning is as long as the prompts need, at least 77 states.", "",
    ]  # fmt: skip
    for by, head in (("length", "prompt tokens, one prompt"), ("batch", "prompts of 77 tokens")):
        rows = [[str(n), *(f"{times[by, n, name]:.2f}" for name in names)] for axis, n, _ in points if axis == by]
        lines += table([head, *names], rows)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=8, help="images scored at a time (8)")
    parser.add_argument("--tiny", action="store_true", help="smoke test with tiny models; the numbers are meaningless")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="file for the table")
    options = parser.parse_args()
    size, rounds = TINY if options.tiny else FULL, options.rounds
    warnings.filterwarnings("ignore", message=r".*\btokens\b")  # `text: whole` truncates long prompts
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sd, clip, parameters = write_models(folder, size)
        common = {
            "backbone": {"name": "sd", "checkpoint": sd},
            "encoder": {"name": "clip-segment", "checkpoint": sd},
            "data": {
                "name": "folder",
                "folder": write_images(folder / "images", size["pixels"]),
                "resolution": size["pixels"],
            },
            "loop": {"batch_size": BATCH},
            "output": str(folder / "run"),
        }
        lora = {"rank": 32, "dropout": 0.0}
        align = override(common, {"trainer": {"name": "align", "lora": lora}})
        steps = {"num_steps": SAMPLING, "gradient_steps": {"name": "grouped-random", "groups": CHOSEN}}
        trainer = {"name": "reward", "lora": lora, "resolution": size["reward pixels"], **steps}
        reward = override(common, {"trainer": trainer, "rewards": [{"name": "denscore", "checkpoint": clip}]})
        grow = {"encoder.max_tokens": 77, "encoder.overflow": "grow"}
        runs = {"align": override(align, grow), "reward": override(reward, grow)}
        trainers = {name: build_from_config(run, Runtime()).trainer.train() for name, run in runs.items()}
        scored, model = scoring(rounds, clip, options.images, size["reward pixels"])
        lines = [
            "# Scoring, align steps and growth", "",
            "`python benchmarks/training.py" + (" --tiny" if options.tiny else "") + "`", "",
            f"A Stable Diffusion with a UNet of {parameters / 1e6:.1f}M parameters and a LoRA of rank 32 at "
            f"{size['pixels']} pixels, random weights, float32; medians of {rounds} round(s).", "",
            "## Scoring", "", *scored, "## Caches", "", *caches(rounds, align, folder / "cache"), "## Growth", "",
            *growth(rounds, trainers, encoding.clip_segment(*size["encoder"]), model, size),
            f"Machine: {machine_text()}.",
        ]  # fmt: skip
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
