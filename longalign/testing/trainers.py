"""The conformance check of a trainer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from longalign.config.changes import override
from longalign.config.run import RunConfig, load_config
from longalign.files.weights import load_tensors
from longalign.loop.fit import fit
from longalign.testing.common import config_checks, expect, run_checks

#: number of optimizer steps
STEPS = 3


def check_trainer(run: Any) -> None:
    """Checks that a trainer trains, logs, saves and resumes.

    It checks the trainer's config, and trains a run for three steps in a temporary folder. Losses must be finite, and a
    saved weight must change. A second run that stops after two steps and is resumed must log the same numbers and
    save the same weights as the first run, bit by bit.

    Args:
        run: config of a run with the trainer, as for `longalign.fit`, with tiny checkpoints. Its keys ``output``,
            ``loop.steps``, ``loop.save_every``, ``loop.keep`` and ``loop.log_every`` are overridden.

    Raises:
        AssertionError: listing all failed checks.
    """
    config: RunConfig = load_config(run)
    assert config.trainer is not None

    with tempfile.TemporaryDirectory() as folder:
        settings = {"loop.save_every": 1, "loop.keep": None, "loop.log_every": 1}
        whole, halves = (
            override(config, {**settings, "loop.steps": STEPS, "output": str(Path(folder) / n)}) for n in "ab"
        )

        def trains() -> None:
            result = fit(whole)
            expect(result.step == STEPS, f"expected {STEPS} steps, got {result.step}")
            losses = [value for line in _log(whole) for key, value in line.items() if key.endswith("loss")]
            expect(bool(losses), "the log has no key that ends in 'loss'")
            first, last = (_weights(whole, step) for step in (1, STEPS))
            expect(any(not torch.equal(first[key], last[key]) for key in first), "no saved weight changed")

        def resumes_bit_exactly() -> None:
            fit(override(halves, {"loop.steps": STEPS - 1}))
            fit(halves, resume=halves.output)
            expect(
                _log(halves) == _log(whole),
                "a resumed run logs different numbers; keep state in buffers, not in attributes",
            )
            one, other = _weights(whole, STEPS), _weights(halves, STEPS)
            expect(all(torch.equal(one[key], other[key]) for key in one), "a resumed run saves different weights")

        run_checks(
            "trainers", config.trainer, [*config_checks("trainers", config.trainer), trains, resumes_bit_exactly]
        )


def _log(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def _weights(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """Returns all tensors in the safetensors files of the checkpoint at ``step``, by ``<file>/<name>``."""
    found = {}
    for file in sorted((Path(config.output) / f"checkpoint-{step:06d}").glob("*.safetensors")):
        found |= {f"{file.name}/{key}": tensor for key, tensor in load_tensors(file).items()}
    return found
