"""Fact accuracy and solver error against the number of sampling steps, for the solvers of training and of sampling.

``ddim`` and ``dpm++`` are the solvers of the trainer `reward`, ``unipc (sampling)`` and ``dpm++ (sampling)`` those of
``longalign generate``. All sample the same held-out long captions from the same noise. The oracle measures the facts.
The solver error is the mean absolute difference of a pixel (0 to 1) to the image of ``dpm++`` with many steps.

Run ``python benchmarks/solvers.py [checkpoint or config] [--prompts 64] [--num-steps 12 20 25 50]``. The default is the
config of the demo's align stage, before its training: the bundled weights. It writes a table next to itself.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reward_step import non_default_options, table
from torch import Tensor

from longalign.config.run import load_config
from longalign.demo import default_config, held_out_captions
from longalign.encoders.base import TruncationWarning
from longalign.evaluation.bootstrap import bootstrap
from longalign.evaluation.measure import measure
from longalign.evaluation.record import machine_text
from longalign.functional.diffusion import predict_guided
from longalign.functional.rollout_gradient import rollout
from longalign.functional.solvers import ddim, dpmpp_2m, trailing_timesteps
from longalign.inference.sampling import load_model, sample
from longalign.metrics import FactMetric

BATCH = 64
TRAINING = {"ddim": ddim, "dpm++": dpmpp_2m}


@torch.no_grad()
def sample_training(solver: str, backbone: Any, encoder: Any, texts: list[str], num_steps: int, scale: float) -> Tensor:
    """Samples with a solver of the trainer, from the noise that `longalign.inference.sampling.sample` uses."""
    steps = trailing_timesteps(num_steps, len(backbone.noise_levels))
    coefficients, images = TRAINING[solver](backbone.noise_levels, steps, backbone.prediction), []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        conditioning = encoder.encode([*batch, *[""] * len(batch)])
        shape = backbone.latent_shape(None, None)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(start + i)) for i in range(len(batch))]
        network = partial(predict_guided, lambda x, t, c=conditioning: backbone.predict(x, t, c), scale=scale)
        latents, _ = rollout(network, torch.stack(noise).to(backbone.device), coefficients)
        images.append(backbone.decode(latents).float().cpu())
    return torch.cat(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=default_config("align"))
    parser.add_argument("--num-steps", type=int, nargs="+", default=[12, 20, 25, 50], help="sampling steps")
    parser.add_argument("--reference", type=int, default=200, help="steps of the reference (200)")
    parser.add_argument("--prompts", type=int, default=64, help="held-out captions (64)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore", TruncationWarning)

    reward = load_config(default_config("reward"))
    guidance = getattr(reward.trainer, "guidance", 7.5)
    captions = held_out_captions([load_config(default_config("align")), reward], options.prompts)
    texts = [caption.text for caption in captions]
    _, backbone, encoder = load_model(options.source)
    backbone.eval()
    encoder.eval()

    def sampling(solver: str, num_steps: int) -> Tensor:
        settings = {"num_steps": num_steps, "guidance": guidance, "batch_size": BATCH, "solver": solver}
        return sample(backbone, encoder, texts, seeds=range(len(texts)), **settings)

    def training(solver: str, num_steps: int) -> Tensor:
        return sample_training(solver, backbone, encoder, texts, num_steps, guidance)

    methods: dict[str, Callable[[int], Tensor]] = {solver: partial(training, solver) for solver in TRAINING}
    methods |= {f"{solver} (sampling)": partial(sampling, solver) for solver in ("unipc", "dpm++")}
    reference, rows = training("dpm++", options.reference), []
    for name, make in methods.items():
        for num_steps in options.num_steps:
            images = make(num_steps)
            facts = bootstrap(100 * measure(images, texts, [FactMetric(captions)])["facts"])
            error = (images - reference).abs().mean().item()
            interval = f"{facts.mean:.1f} [{facts.low:.1f}, {facts.high:.1f}]"
            rows.append([f"`{name}`", str(num_steps), interval, f"{error:.4f}"])
            print(*rows[-1], sep=" | ", flush=True)
    source = "" if options.source == parser.get_default("source") else f" {options.source}"
    lines = [
        "# Solvers and steps on the synthetic scenes", "",
        f"`python benchmarks/solvers.py{source}{non_default_options(options, parser, ('source',))}`", "",
        f"{options.prompts} held-out captions of 60 to 160 words, guidance {guidance:g}. Fact accuracy with 95% "
        "bootstrap intervals over prompts. Solver error: mean absolute pixel difference to the images of `dpm++` with "
        f"{options.reference} steps.", "",
        *table(["solver", "steps", "fact accuracy, %", "solver error"], rows),
        f"Machine: {machine_text()}.",
    ]  # fmt: skip
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
