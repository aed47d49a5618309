"""Accuracy of the oracle and the bundled weights on the synthetic scenes.

Run ``python benchmarks/synthetic_scenes.py``. It writes a table next to itself.

All samples use seeds that the weights were not trained on.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "mini"))

from clip import normalize
from common import WEIGHTS, render_images, scene_and_caption
from facts import FactHead, label_tensor, labels_of_caption
from longclip import variants

from longalign.backbones.stable_diffusion.sd import SDBackbone
from longalign.evaluation.record import machine_text
from longalign.inference.sampling import sample
from longalign.mini import oracle
from longalign.mini.captions import Caption, describe
from longalign.mini.scenes import sample_scene
from longalign.registry import backbones, encoders

ROWS: list[tuple[str, str, str, str]] = []


def add_row(name: str, value: float, target: str, setting: str) -> None:
    """Adds a row with a fraction as a percentage to the table."""
    ROWS.append((name, f"{100 * value:.2f}%", target, setting))
    print(*ROWS[-1], sep=" | ", flush=True)


def accuracy(images: np.ndarray, captions: list[Caption]) -> float:
    """Fraction of the captions' facts that the images show."""
    return float(np.mean([f for image in oracle.verdicts(images, captions) for s in image for f in s]))


def sample_captions(
    count: int, things: tuple[int, int], words: tuple[int, int], seed: int
) -> tuple[list, list[Caption]]:
    """Samples scenes with their captions."""
    pairs = [scene_and_caption(np.random.default_rng([seed, i]), things, words) for i in range(count)]
    return [s for s, _ in pairs], [c for _, c in pairs]


@torch.no_grad()
def measure_oracle(backbone: SDBackbone) -> None:
    scenes, captions = sample_captions(1000, (1, 9), (120, 120), 101)
    images = render_images(scenes)
    add_row("oracle on true renders", accuracy(images.numpy(), captions), ">= 99.5%", "1000 scenes of 1 to 9 objects")
    decoded = torch.cat([backbone.decode(backbone.encode_images(chunk)) for chunk in images.split(50)])
    add_row("oracle on VAE reconstructions", accuracy(decoded.numpy(), captions), ">= 97%", "the same scenes")


@torch.no_grad()
def measure_unet(backbone: SDBackbone) -> None:
    encoder = encoders.build({"name": "clip-truncate", "checkpoint": "mini/sd"})
    count = 256
    for things, guidance, target in (((1, 3), 2.0, ">= 95%"), ((1, 3), 3.0, "none"), ((4, 6), 2.0, "none")):
        scenes = [sample_scene(np.random.default_rng([102, i]), things) for i in range(count)]
        captions = [
            describe(s, np.random.default_rng([103, i]), words=12 * len(s.things)) for i, s in enumerate(scenes)
        ]
        texts = [c.text for c in captions]
        images = sample(
            backbone, encoder, texts, num_steps=25, guidance=guidance, seeds=list(range(count)), batch_size=64
        )
        add_row(f"UNet generates {things[0]} to {things[1]} objects", accuracy(images.numpy(), captions), target,
                f"{count} short captions, UniPC 25 steps, guidance {guidance:g}")  # fmt: skip
        if guidance == 2:
            decoded = [backbone.decode(backbone.encode_images(chunk)) for chunk in render_images(scenes).split(64)]
            add_row("their true renders through the VAE", accuracy(torch.cat(decoded).numpy(), captions), "none",
                    "the same scenes")  # fmt: skip


def measure_t5() -> None:
    from transformers import T5EncoderModel, T5Tokenizer

    encoder = T5EncoderModel.from_pretrained(WEIGHTS / "t5", torch_dtype=torch.float32).eval()
    tokenizer = T5Tokenizer.from_pretrained(WEIGHTS / "t5")

    @torch.no_grad()
    def states(captions: list[Caption]) -> torch.Tensor:
        out = []
        for i in range(0, len(captions), 50):
            tokens = tokenizer([c.text for c in captions[i : i + 50]], padding=True, return_tensors="pt")
            mask = tokens.attention_mask[..., None]
            out.append((encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(out)

    torch.manual_seed(0)
    train, test = (sample_captions(n, (1, 9), (8, 140), seed)[1] for n, seed in ((6000, 104), (500, 105)))
    x, y = states(train), label_tensor([labels_of_caption(c) for c in train])
    head = FactHead(x.shape[1])
    mean, std = x.mean(0), x.std(0)
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(600):
        pick = torch.randint(len(x), (512,))
        loss, _ = head((x[pick] - mean) / std, y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, read = head((states(test) - mean) / std, label_tensor([labels_of_caption(c) for c in test]))
    add_row(
        "a linear probe reads the facts from T5's mean state", float(read), ">= 90%", "500 captions, 8 to 140 words"
    )


@torch.no_grad()
def measure_longclip() -> None:
    from transformers import CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "longclip")
    galleries, texts = [], []
    for i in range(200):
        rng = np.random.default_rng([106, i])
        scene = sample_scene(rng, (6, 9))
        caption = describe(scene, rng, words=150)
        galleries += variants(scene, caption, tokenizer, rng)
        texts.append(caption.text)
    for name, limit in (("longclip", 248), ("clip", 77)):
        clip = CLIPModel.from_pretrained(WEIGHTS / name, torch_dtype=torch.float32).eval()
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        text = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)
        images = torch.cat([clip.get_image_features(normalize(render_images(galleries[i : i + 100]))).pooler_output
                            for i in range(0, len(galleries), 100)])  # fmt: skip
        images = F.normalize(images, dim=-1).view(200, 8, -1)
        best = torch.einsum("qd,qvd->qv", text, images).argmax(-1)
        target = "above truncation" if limit == 248 else "(chance 12.5%)"
        add_row(f"R@1 of 8 by facts after 77 tokens, {limit} tokens encoded", float((best == 0).float().mean()), target,
                f"{name}, 200 captions of 150 words")  # fmt: skip


def main() -> None:
    start = time.time()
    backbone = backbones.build({"name": "sd", "checkpoint": "mini/sd"})
    measure_oracle(backbone)
    measure_unet(backbone)
    measure_t5()
    measure_longclip()
    lines = ["# Oracle and bundled weights", "", "`python benchmarks/synthetic_scenes.py`", ""]
    lines += ["| measurement | result | target | data |", "|---|---|---|---|", *(f"| {' | '.join(r)} |" for r in ROWS)]
    megabytes = sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) / 2**20
    lines += ["", f"All weights and tokenizers together: {megabytes:.1f} MiB. Machine: {machine_text()}."]
    lines += [f"Measured in {time.time() - start:.0f} s."]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
