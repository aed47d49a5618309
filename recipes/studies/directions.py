"""How well few captions estimate the common direction of text embeddings, for `mini/denscore` and `mini/pickscore`.

For directions of n captions, prints the mean of ``eta`` and the cosine to the direction of 5000 other captions, over
400 batches. In a batch, V is computed from the captions whose eta is measured; the last row measures the eta of other
captions. Also writes the directions of 48 and 5000 captions to ``runs/studies/direction-<n>.safetensors``.

Run: ``python recipes/studies/directions.py``, three minutes on one core; prints a Markdown table.
"""

from __future__ import annotations

from pathlib import Path

import torch

from longalign.directions.compute import compute_direction
from longalign.functional import preference
from longalign.registry import data, rewards

REWARDS = {
    "mini/denscore": {"name": "denscore", "checkpoint": "mini/denscore"},
    "mini/pickscore": {"name": "pickscore", "checkpoint": "mini/pickscore", "text": "segments"},
}
BATCHES, CORPUS, REPEATS = (2, 4, 8, 16, 48), 5000, 400
OUTPUT = Path("runs/studies")


def captions(seed: int, size: int) -> list[str]:
    """Captions of 60 to 160 words, as in training."""
    scenes = data.build({"name": "scenes", "seed": seed, "size": size, "objects": [5, 9], "words": [60, 160]})
    return [scenes.prompt(i) for i in range(size)]


@torch.no_grad()
def main() -> None:
    corpus, others = captions(11, CORPUS), captions(12, 2000)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print("| reward | captions | eta | cosine to the corpus |\n|---|---|---|---|")
    for name, config in REWARDS.items():
        reward = rewards.build(config).eval()
        text = torch.cat([reward.text_features(others[i : i + 100]) for i in range(0, len(others), 100)])
        directions = {n: compute_direction(reward, corpus[:n], config=rewards.validate(config)) for n in (48, CORPUS)}
        common = directions[CORPUS].vector
        generator = torch.Generator().manual_seed(0)
        for size in BATCHES:
            rows = [torch.randperm(len(text), generator=generator)[:size] for _ in range(REPEATS)]
            vectors = torch.stack([preference.common_direction(text[r]) for r in rows])
            eta = torch.stack([preference.eta(text[r], v).mean() for r, v in zip(rows, vectors, strict=True)])
            print(f"| {name} | {size} | {eta.mean():.3f} | {(vectors @ common).mean():.3f} |")
        print(f"| {name} | {CORPUS}, other captions | {preference.eta(text, common).mean():.3f} | 1 |", flush=True)
        if name == "mini/denscore":
            for size, direction in directions.items():
                direction.save(OUTPUT / f"direction-{size}.safetensors")


if __name__ == "__main__":
    main()
