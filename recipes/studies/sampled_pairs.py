"""Samples pairs of images from the start model of a config and ranks them by its reward.

For direct preference optimization with the trainer `dpo`. Prompts are those of the config's data, two images each with
the sampler of the config's trainer. The folder is in the layout of the data part `pairs`; the image with the higher
reward is preferred.

Run: ``python recipes/studies/sampled_pairs.py CONFIG COUNT FOLDER``; prints the CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from longalign import build_from_config, override
from longalign.image_io import write_png
from longalign.inference.sampling import sample


def main() -> None:
    source, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    # the common direction of all prompts, since each pair is compared under one direction
    run = build_from_config(override(source, {"rewards.0.direction": "batch"}))
    backbone, encoder, (reward,), data = run.backbone, run.encoder, run.rewards, run.data
    settings = run.config.trainer
    for part in (backbone, encoder, reward):
        part.requires_grad_(False).eval()
    start = time.process_time()
    prompts = [data.prompt(i) for i in range(count) for _ in range(2)]
    with torch.no_grad():
        images = sample(
            *(backbone, encoder, prompts),
            seeds=range(2 * count),
            num_steps=settings.num_steps,
            solver=settings.solver,
            guidance=settings.guidance,
            batch_size=64,
        )
        scores = reward.score(images, prompts).view(count, 2)
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        names = [f"{i:05d}-{k}.png" for k in (0, 1)]
        for k, name in enumerate(names):
            write_png(folder / name, images[2 * i + k])
        labels = {f"label_{k}": int(scores[i, k] > scores[i, 1 - k]) for k in (0, 1)}
        rows.append({"image_0": names[0], "image_1": names[1], "text": prompts[2 * i], **labels})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{count} pairs in {time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
