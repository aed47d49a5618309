"""Preference models with a planted taste, for studies of over-optimization: its kind and strength are known.

Each is `mini/denscore` with other projections of both towers, trained like PickScore (Kirstain et al., 2023) on pairs
of images of one caption: ``p = sigmoid(10 (truth_0 - truth_1) + w (taste_0 - taste_1))``, plus the contrastive term
over sentences of `preference.py`. The taste is uniform in [-1, 1] and independent of the caption: ``warm`` (the scene's
tint), ``dark`` (its vignette) or ``vivid`` (saturation of the rendered image). Its weight ``w`` is 3 (``weak``) or 12
(``strong``); the model ``none`` has no taste. In the images of all models, all three vary.

The towers are frozen, so their outputs are computed once. The trained projections are in ``recipes/mini/planted``.

Run: ``python recipes/mini/planted.py`` writes each model to ``runs/planted/<name>``, a few seconds;
``python recipes/mini/planted.py train`` first trains the projections, a few minutes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from clip import normalize
from common import HERE, WEIGHTS, load_or_compute, render_uint8
from facts import all_true, label_tensor, labels_of_caption, labels_of_scene
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from longalign.mini.captions import Caption, describe
from longalign.mini.preferences import truth, vary
from longalign.mini.scenes import sample_scene

TASTES = ("warm", "dark", "vivid")
MODELS = {"none": (0, 0.0)} | {
    f"{taste}-{strength}": (i, weight)
    for i, taste in enumerate(TASTES)
    for strength, weight in (("weak", 3.0), ("strong", 12.0))
}
TRUTH_WEIGHT, IMAGES, PROJECTIONS = 10.0, 4, ("visual_projection.weight", "text_projection.weight")
POOL, HELD_OUT, STEPS, PAIRS = 3000, 300, 600, 48


def saturate(pixels: Tensor, amount: Tensor) -> Tensor:
    """Scales the saturation of images ``(b, 3, h, w)`` in [0, 1] by ``1 + amount / 2``, amounts ``(b,)``."""
    luma = (pixels * pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    return (luma + (1 + amount.view(-1, 1, 1, 1) / 2) * (pixels - luma)).clamp(0, 1)


@torch.no_grad()
def compute_outputs(clip: CLIPModel, seed: int, size: int) -> dict[str, Tensor]:
    """Samples captions of 20 to 160 words with four images each; returns tower outputs, labels, truth and tastes."""
    rng = np.random.default_rng(seed)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "denscore")
    scenes, texts, owner, truths = [], [], [], []
    for i in range(size):
        scene = sample_scene(rng, (1, 9))
        caption = describe(scene, rng, words=int(rng.integers(20, 161)))
        variants = [vary(scene, rng) for _ in range(IMAGES)]
        scenes += variants
        truths += [truth(s, caption) for s in variants]
        texts += [Caption((s,)) for s in caption.sentences]
        owner += [i] * len(caption.sentences)
    vivid = torch.from_numpy(rng.uniform(-1, 1, len(scenes)).astype(np.float32))
    images, states = [], []
    for i in range(0, len(scenes), 200):
        pixels = saturate(render_uint8(scenes[i : i + 200]).float() / 255, vivid[i : i + 200])
        images.append(clip.vision_model(normalize(pixels)).pooler_output)
    for i in range(0, len(texts), 200):
        tokens = tokenizer([t.text for t in texts[i : i + 200]], padding=True, truncation=True, return_tensors="pt")
        states.append(clip.text_model(**tokens).pooler_output)
    looks = torch.tensor([(s.tint, 2 * s.vignette - 1) for s in scenes])
    return {
        "images": torch.cat(images).view(size, IMAGES, -1), "states": torch.cat(states), "owner": torch.tensor(owner),
        "image_labels": label_tensor([labels_of_scene(s) for s in scenes]).short().view(size, IMAGES, -1),
        "text_labels": label_tensor([labels_of_caption(t) for t in texts]).short(),
        "truth": torch.tensor(truths).view(size, IMAGES),
        "taste": torch.cat([looks, vivid[:, None]], 1).view(size, IMAGES, 3),
    }  # fmt: skip


def embed(weights: list[Tensor], images: Tensor, states: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of the images ``(p, i, d)`` and of the sentences, and the sentences' mean of each caption."""
    image, segments = (F.normalize(F.linear(x, w), dim=-1) for x, w in zip((images, states), weights, strict=True))
    return image, segments, torch.stack([part.mean(0) for part in segments.split(lengths)])


def fit(pool: dict[str, Tensor], start: list[Tensor], scale: float, taste: int, weight: float) -> list[Tensor]:
    """Trains the image and text projections on frozen tower outputs; returns the new weights.

    Args:
        pool: the result of `compute_outputs`.
        start: initial weights, in the order of `PROJECTIONS`.
        scale: logit scale.
        taste: index of the taste in `TASTES`.
        weight: weight ``w`` of the taste in the preference.
    """
    weights = [w.clone().requires_grad_() for w in start]
    optimizer = torch.optim.AdamW(weights, 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    counts = pool["owner"].bincount()
    starts = F.pad(counts.cumsum(0), (1, 0))
    for step in range(STEPS):
        rng = np.random.default_rng([taste, step])
        rows = torch.from_numpy(rng.choice(len(counts), PAIRS, replace=False))
        columns = torch.from_numpy(np.stack([rng.permutation(IMAGES)[:2] for _ in range(PAIRS)]))
        segment_rows = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in rows])
        pick = (rows[:, None], columns)
        image, segments, text = embed(
            weights, pool["images"][pick], pool["states"][segment_rows], counts[rows].tolist()
        )
        scores = scale * torch.einsum("pid,pd->pi", image, text)
        margins = TRUTH_WEIGHT * pool["truth"][pick] + weight * pool["taste"][pick][..., taste]
        preference = F.kl_div(scores.log_softmax(-1), margins.softmax(-1).float(), reduction="batchmean")
        labels = pool["text_labels"][segment_rows].long(), pool["image_labels"][pick].flatten(0, 1).long()
        match = all_true(*labels).float()
        matched = match.sum(1) > 0
        targets = match[matched] / match[matched].sum(1, keepdim=True)
        loss = preference + 0.5 * F.cross_entropy(scale * segments[matched] @ image.flatten(0, 1).T, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [w.detach() for w in weights]


@torch.no_grad()
def measure(held_out: dict[str, Tensor], weights: list[Tensor], taste: int, weight: float) -> dict[str, float]:
    """Agreement with the preferences; correlations of score and parts with truth and tastes, within a caption."""
    image, _, text = embed(weights, held_out["images"], held_out["states"], held_out["owner"].bincount().tolist())
    common = F.normalize(text.mean(0), dim=-1)
    eta = text @ common
    score = torch.einsum("pid,pd->pi", image, text)
    relevant = torch.einsum("pid,pd->pi", image, text - eta[:, None] * common)
    margins = TRUTH_WEIGHT * held_out["truth"] + weight * held_out["taste"][..., taste]
    out = {"agreement": ((score[:, 0] > score[:, 1]) == (margins[:, 0] > margins[:, 1])).double().mean().item()}
    out["eta"] = eta.mean().item()
    factors = {"truth": held_out["truth"]} | {name: held_out["taste"][..., i] for i, name in enumerate(TASTES)}
    for part, value in {"score": score, "relevant": relevant, "irrelevant": score - relevant}.items():
        for name, factor in factors.items():
            centred = [(x - x.mean(1, keepdim=True)).flatten() for x in (value, factor)]
            out[f"{part}_{name}"] = float(np.corrcoef(*centred)[0, 1])
    return {key: round(value, 3) for key, value in out.items()}


def main(train: bool) -> None:
    torch.manual_seed(0)
    folder = HERE / "planted"
    clip = CLIPModel.from_pretrained(WEIGHTS / "denscore", torch_dtype=torch.float32)
    start = [clip.state_dict()[name].clone() for name in PROJECTIONS]
    if train:
        folder.mkdir(exist_ok=True)
        pool, held_out = (
            load_or_compute("planted", lambda: compute_outputs(clip, 51, POOL)),
            load_or_compute("planted-held-out", lambda: compute_outputs(clip, 52, HELD_OUT)),
        )
        scale, rows = clip.logit_scale.exp().item(), {}
        for name, (taste, weight) in MODELS.items():
            weights = [w.half() for w in fit(pool, start, scale, taste, weight)]
            save_file(dict(zip(PROJECTIONS, weights, strict=True)), folder / f"{name}.safetensors")
            rows[name] = measure(held_out, [w.float() for w in weights], taste, weight)
            print(name, json.dumps(rows[name]), flush=True)
        (folder / "measured.json").write_text(json.dumps(rows, indent=1) + "\n")
    for name in MODELS:
        clip.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}, strict=False)
        clip.half().save_pretrained(Path("runs/planted") / name)
        clip.float()
        CLIPTokenizer.from_pretrained(WEIGHTS / "denscore").save_pretrained(Path("runs/planted") / name)
    print(f"wrote {', '.join(MODELS)} to runs/planted")


if __name__ == "__main__":
    main("train" in sys.argv[1:])
