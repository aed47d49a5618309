"""How much gradients of different batches agree: the cells of a study at its start model, without training.

For each cell, gradients of COUNT batches of the config's data are computed from the same weights. Their mean pairwise
cosine is near 1 if one batch shows the direction of all, and near 0 if it is mostly noise.

Run: ``python recipes/studies/gradient_noise.py CONFIG COUNT CELLS [CELLS ...]``; prints a Markdown table.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from longalign import build_from_config, load_config, override
from longalign.ablation.cells import read_cells
from longalign.loop.batches import load_batches, plan_batches


def main() -> None:
    base, count = load_config(sys.argv[1]), int(sys.argv[2])
    cells = {name: changes for path in sys.argv[3:] for name, changes in read_cells(path)["cells"].items()}
    print("| cell | CPU seconds of a step | cosine of gradients |\n|---|---|---|")
    for name, changes in cells.items():
        config = override(base, changes)
        if config.trainer is None:
            continue
        torch.manual_seed(0)
        run = build_from_config(config)
        trainer, parameters = run.trainer.train(), run.trainer.trainable()
        batches = load_batches(
            run.data, plan_batches(run.data, config.loop.batch_size, 0, 0, 0, 1), trainer.needs_images, 0
        )
        total, seconds = torch.zeros(sum(p.numel() for p in parameters)), 0.0
        for _ in range(count):
            batch, start = next(batches), time.process_time()
            trainer.step(batch, Tensor.backward)
            seconds += time.process_time() - start
            gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            total[: len(gradient)] += gradient / gradient.norm()
            for parameter in parameters:
                parameter.grad = None
        cosine = (float(total.square().sum()) - count) / (count * (count - 1))
        print(f"| {name} | {seconds / count:.1f} | {cosine:.3f} |", flush=True)


if __name__ == "__main__":
    main()
