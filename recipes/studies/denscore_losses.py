"""Trains the bundled CLIP with Denscore's losses, alone and together, and measures the preference models.

Each is trained by ``examples/mini-denscore.yaml``: 100 steps of 16 pairs, three training seeds. R@1 is measured on 400
true renders. Agreement and correlations are measured on four imperfect images each of 300 held-out captions; the
correlations are within a caption. Intervals resample captions and training seeds; differences to the first model are
paired.

Run: ``python recipes/studies/denscore_losses.py``; finished trainings are kept. Prints a Markdown table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from longalign import fit, load_config, override
from longalign.functional import preference
from longalign.mini.preferences import taste, truth, vary
from longalign.mini.scenes import render_batch
from longalign.registry import data, rewards

BASE = {"loop.steps": 100, "loop.batch_size": 16, "loop.warmup": 10}
CELLS = {
    "mini/clip, not trained": None,
    "preference": {"trainer.contrastive_weight": 0.0, "data.captions": False},
    "contrast": {"trainer.preference_weight": 0.0, "trainer.contrastive_weight": 1.0},
    "both": {},
    "both, contrast without captions of the images": {"data.captions": False},
}
SEEDS, OUTPUT = (0, 1, 2), Path("runs/studies/denscore-losses")
CAPTIONS, RENDERS, IMAGES, RESAMPLES = 300, 400, 4, 1000
COLUMNS = ["R@1, `C_P`", "R@1, `C_P_perp`", "agreement", "eta"] + [
    f"{part}: {factor}" for part in ("text-relevant", "text-irrelevant") for factor in ("truth", "taste")
]
Arrays = dict[str, NDArray[np.float64]]


def trained(cell: str, changes: dict[str, object] | None, seed: int) -> str:
    """Returns the checkpoint of a cell, and trains it if it is not there."""
    if changes is None:
        return "mini/clip"
    folder = OUTPUT / f"{list(CELLS).index(cell)}-{seed}"
    checkpoint = folder / f"checkpoint-{BASE['loop.steps']:06d}" / "reward"
    if not checkpoint.exists():
        fit(
            override(load_config("examples/mini-denscore.yaml"), BASE | changes | {"seed": seed, "output": str(folder)})
        )
    return str(checkpoint)


def held_out() -> tuple[list[str], torch.Tensor, NDArray[np.float64], NDArray[np.float64], list[str], torch.Tensor]:
    """Captions with imperfect images, their truth and taste, and captions with true renders."""
    size = CAPTIONS + RENDERS
    config = {"name": "scenes", "seed": 61, "size": size, "objects": [5, 9], "words": [60, 160]}
    scenes = data.build(config)
    pairs, rng = [scenes.scene(i) for i in range(size)], np.random.default_rng(61)
    variants = [[vary(scene, rng) for _ in range(IMAGES)] for scene, _ in pairs[:CAPTIONS]]
    truths = [[truth(s, caption) for s in row] for row, (_, caption) in zip(variants, pairs, strict=False)]
    tastes = [[taste(s) for s in row] for row in variants]
    texts = [caption.text for _, caption in pairs]
    images = torch.from_numpy(render_batch([s for row in variants for s in row]))
    renders = torch.from_numpy(render_batch([scene for scene, _ in pairs[CAPTIONS:]]))
    return texts[:CAPTIONS], images, np.array(truths), np.array(tastes), texts[CAPTIONS:], renders


@torch.no_grad()
def measure(checkpoint: str, sets: tuple) -> Arrays:
    """Values per caption: hits of the retrieval, and scores of the imperfect images."""
    captions, images, _, _, texts, renders = sets
    reward = rewards.build({"name": "denscore", "checkpoint": checkpoint}).eval()
    text = torch.cat([reward.text_features((captions + texts)[i : i + 50]) for i in range(0, CAPTIONS + RENDERS, 50)])
    pictures = torch.cat([images, renders])
    image = torch.cat([reward.image_features(pictures[i : i + 100]) for i in range(0, len(pictures), 100)])
    common = preference.common_direction(text)
    relevant = preference.perpendicular(text, common)
    hits = {
        name: (image[len(images) :] @ vectors[CAPTIONS:].T).argmax(0).eq(torch.arange(RENDERS)).double().numpy()
        for name, vectors in (("whole", text), ("perp", relevant))
    }
    rows = image[: len(images)].view(CAPTIONS, IMAGES, -1)
    scores = {
        name: torch.einsum("nid,nd->ni", rows, vectors[:CAPTIONS]).double().numpy()
        for name, vectors in (("score", text), ("relevant", relevant))
    }
    eta = preference.eta(text, common)[:CAPTIONS].double().numpy()
    return hits | scores | {"irrelevant": scores["score"] - scores["relevant"], "eta": eta}


def summarize(values: Arrays, truths: NDArray, tastes: NDArray, rows: NDArray, renders: NDArray) -> NDArray:
    """The table's columns for a resample of captions."""

    def correlation(name: str, factor: NDArray) -> float:
        a, b = (x[rows] - x[rows].mean(1, keepdims=True) for x in (values[name], factor))
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    margin, score = (10 * truths + 4 * tastes)[rows], values["score"][rows]
    agreement = np.mean((score[:, ::2] > score[:, 1::2]) == (margin[:, ::2] > margin[:, 1::2]))
    first = [values["whole"][renders].mean(), values["perp"][renders].mean(), agreement, values["eta"][rows].mean()]
    pairs = [(part, factor) for part in ("relevant", "irrelevant") for factor in (truths, tastes)]
    return np.array(first + [correlation(*pair) for pair in pairs])


def main() -> None:
    sets = held_out()
    truths, tastes, rng = sets[2], sets[3], np.random.default_rng(0)
    values = {
        cell: [measure(trained(cell, changes, seed), sets) for seed in (SEEDS if changes is not None else SEEDS[:1])]
        for cell, changes in CELLS.items()
    }
    draws = [(np.arange(CAPTIONS), np.arange(RENDERS), np.arange(len(SEEDS)))] + [
        (rng.integers(CAPTIONS, size=CAPTIONS), rng.integers(RENDERS, size=RENDERS), rng.integers(len(SEEDS), size=3))
        for _ in range(RESAMPLES)
    ]
    table = {
        cell: np.array([
            np.mean([summarize(runs[s % len(runs)], truths, tastes, rows, renders) for s in seeds], axis=0)
            for rows, renders, seeds in draws
        ])
        for cell, runs in values.items()
    }  # fmt: skip
    print("| losses | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    base = next(iter(table.values()))
    for cell, results in table.items():
        shown = [text(results[:, i]) for i in range(len(COLUMNS))]
        if results is not base:
            differences = results - base
            shown = [f"{a}<br>{text(differences[:, i], sign='+')}" for i, a in enumerate(shown)]
        print(f"| {cell} | " + " | ".join(shown) + " |", flush=True)


def text(draws: NDArray, sign: str = "") -> str:
    """Value and 95% interval; a difference has a star if its interval excludes zero."""
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    star = "*" if sign and (low > 0 or high < 0) else ""
    return f"{draws[0]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{star}"


if __name__ == "__main__":
    main()
