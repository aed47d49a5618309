"""Small ratios of CPU time, to find a loss of speed within a minute: ``make bench-check``.

In each part, the first row is the reference, and `compare.py` compares ratios to it with ``check.json``. These depend
little on the processor and on other programs. ``python benchmarks/_check.py benchmarks/check.json`` writes new ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import encoding
import numpy as np
import reward_step
import torch
from rollout import BATCH, cpu_seconds, make_trainer, sampler, text_in_every_call

from longalign.encoders.base import Conditioning
from longalign.evaluation.record import machine_text

Calls = dict[str, Callable[[], object]]


def encode() -> Calls:
    """Segments padded to the longest, or grouped by length."""
    encoder, prompts = encoding.clip_segment(4, 256), encoding.mixed(np.random.default_rng(0), 16)
    return {"padding": lambda: encoding.plain(encoder, prompts), "longalign": lambda: encoder.encode(prompts)}


def gradient() -> Calls:
    """Autograd with checkpoints through a rollout, or the exact gradient with replayed calls."""
    trainer = reward_step.build(reward_step.Setting(reward_step.OURS, 2, pixels=64, width=32, batch=2, steps=8))
    prompts = ["a prompt"] * 2

    def ours() -> None:
        trainer.step({"prompt": prompts}, torch.Tensor.backward)

    return {"autograd": lambda: reward_step.plain(trainer, prompts), "longalign": ours}


def text() -> Calls:
    """Keys and values of 1300 text states in every call, or once."""
    trainer = make_trainer(**{"trainer.num_steps": 2})
    sample = sampler(trainer, Conditioning(torch.randn(BATCH + 1, 1300, 128)), trainer.noise(BATCH))

    def in_every_call() -> None:
        with text_in_every_call(trainer.backbone):
            sample()

    return {"in every call": in_every_call, "once": sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {}
    for part in (encode, gradient, text):
        torch.manual_seed(0)
        seconds = cpu_seconds(options.rounds, part())
        parts[part.__name__] = [{"name": name, "seconds": round(value, 4)} for name, value in seconds.items()]
        print(part.__name__, parts[part.__name__], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine_text(), **parts}, indent=0) + "\n")


if __name__ == "__main__":
    main()
