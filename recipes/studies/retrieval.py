"""Table 4 of LongAlign on the synthetic scenes: R@1 of text to image with the first n sentences of each caption.

400 true renders with captions of 60 to 160 words. ``C_P`` is the mean of the unit embeddings of the sentences, and
``C_P_perp`` its part orthogonal to the common direction of the captions.

Run: ``python recipes/studies/retrieval.py``, four minutes on one core; prints a Markdown table.
"""

from __future__ import annotations

import numpy as np
import torch

from longalign.evaluation.measure import evaluate
from longalign.mini.scenes import render_batch
from longalign.registry import data, metrics

REWARDS = {
    "mini/clip": {"name": "clip", "checkpoint": "mini/clip", "text": "segments"},
    "mini/pickscore": {"name": "pickscore", "checkpoint": "mini/pickscore", "text": "segments"},
    "mini/denscore": {"name": "denscore", "checkpoint": "mini/denscore"},
}
COMPONENTS = {"whole": "`C_P`", "orthogonal": "`C_P_perp`"}
SENTENCES = (1, 2, 3, 4, 6, 8, None)


def main() -> None:
    scenes = data.build({"name": "scenes", "seed": 1000001, "size": 400, "objects": [5, 9], "words": [60, 160]})
    pairs = [scenes.scene(i) for i in range(len(scenes))]
    images = torch.from_numpy(render_batch([scene for scene, _ in pairs]))
    prompts = [caption.text for _, caption in pairs]
    print("| reward | " + " | ".join(str(n or "all") for n in SENTENCES) + " |")
    print("|---" * (len(SENTENCES) + 1) + "|")
    for name, reward in REWARDS.items():
        for component, symbol in COMPONENTS.items():
            cells = []
            for count in SENTENCES:
                config = {"name": "retrieval", "reward": reward, "component": component}
                metric = metrics.build(config | ({"sentences": count} if count else {}))
                (values,) = (
                    evaluate({"renders": images}, prompts, [metric], [0] * len(prompts), 50).values["renders"].values()
                )
                cells.append(f"{100 * float(np.nanmean(values)):.1f}")
            print(f"| `{name}`, {symbol} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
