"""Checks the installation: packages, parts, the device, and encoding, scoring and training with the bundled weights."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longalign.config.changes import override
from longalign.config.describe import parts_table
from longalign.diagnostics.checks import Row, compare, run_step
from longalign.diagnostics.environment import unmet_requirements
from longalign.runtime import DTYPES, Runtime, examples_folder

PROMPT = "A red circle is at the top left. A blue square is below it."


def check_installation(device: str | None = None, run_models: bool = True) -> list[Row]:
    """Checks packages, parts and the device, then encodes, scores and trains one step with the bundled weights.

    Args:
        device: a torch device, e.g. ``"cuda:1"``; the fastest available one if None.
        run_models: whether to encode, score and train.

    Returns:
        One or more rows per check. An exception in a check becomes a row with status ``"failed"``.
    """
    steps = {"packages": check_packages, "parts": check_parts, "device": partial(check_device, device)}
    if run_models:
        runs = {"encode": check_encode, "score": check_score, "train": check_train}
        steps |= {name: partial(run, device) for name, run in runs.items()}
    return [row for name, step in steps.items() for row in run_step(name, step)]


def check_packages() -> Iterator[Row]:
    """Yields one row: whether the required packages are installed in the required versions."""
    problems = unmet_requirements()
    yield compare("packages", not problems, "; ".join(problems) or "all required versions", "required versions")


def check_parts() -> Iterator[Row]:
    """Yields one row: whether the config classes of all parts (encoders, rewards, ...) and plugins can be imported."""
    table, problems = parts_table()
    yield compare("parts", not problems, "; ".join(problems) or f"{len(table.splitlines()) - 1} parts", "none broken")


def check_device(device: str | None) -> Iterator[Row]:
    """Yields two rows: which dtypes work on a device, and which compiler `torch.compile` would use.

    A dtype works if a matrix product has a relative error below 0.02. The check fails only if float32 does not work.
    The row of the compiler has status ``"info"``. ``device`` is as for `check_installation`.
    """
    import torch

    device = Runtime.detect(device=device).device
    working, broken = [], []
    factors = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = factors[0] @ factors[1]
    for dtype in DTYPES.values():
        try:
            a, b = factors.to(device, getattr(torch, dtype))
            error = float(((a @ b).float().cpu() - expected).norm() / expected.norm())
            (working if error < 0.02 else broken).append(dtype if error < 0.02 else f"{dtype}: error {error:.2g}")
        except RuntimeError as problem:
            broken.append(f"{dtype}: {str(problem).partition(chr(10))[0]}")
    result = f"matrix products on {device}: {', '.join(working) or 'none'}"
    result += f"; not {'; '.join(broken)}" if broken else ""
    yield compare("device", "float32" in working, result, "float32")
    if torch.device(device).type == "cpu":
        compiler = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)
    else:
        compiler = "triton" if find_spec("triton") else None
    yield Row("torch.compile", "info", f"uses {compiler}" if compiler else "no compiler found (g++ or triton)")


def check_encode(device: str | None) -> Iterator[Row]:
    """Yields one row: whether the bundled CLIP encodes a prompt in segments to finite states of the expected shape.

    ``device`` is as for `check_installation`.
    """
    from longalign import registry

    encoder: Any = registry.encoders.build(
        {"name": "clip-segment", "checkpoint": "mini/sd"}, Runtime.detect("no", device)
    )
    states = encoder.encode([PROMPT]).states
    expected = (1, encoder.max_tokens, encoder.dim)
    ok = tuple(states.shape) == expected and bool(states.isfinite().all())
    yield compare("encode", ok, _summary(states), f"finite states {expected}")


def check_score(device: str | None) -> Iterator[Row]:
    """Yields one row: whether the bundled reward Denscore gives a score in (-1, 1) with a nonzero image gradient.

    ``device`` is as for `check_installation`.
    """
    import torch

    from longalign import registry

    reward: Any = registry.rewards.build(
        {"name": "denscore", "checkpoint": "mini/denscore"}, Runtime.detect("no", device)
    )
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = reward.score(image, [PROMPT])
    score.sum().backward()
    gradient = image.grad
    ok = tuple(score.shape) == (1,) and abs(score.item()) < 1 and gradient is not None and _is_nonzero(gradient)
    yield compare("score", ok, f"{score.item():.4f}", "a cosine with gradient")


def check_train(device: str | None) -> Iterator[Row]:
    """Trains the bundled model for one step, and yields one row: whether the loss is finite and the LoRA is nonzero.

    ``device`` is as for `check_installation`.
    """
    from longalign.checkpoints.checkpoint import load_weights
    from longalign.loop.fit import fit

    changes = {"loop.steps": 1, "loop.batch_size": 2, "loop.warmup": 0}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        config = override(examples_folder() / "mini-align.yaml", {**changes, "output": str(Path(folder) / "run")})
        result = fit(config, device=device)
        weights = [tensor for lora in load_weights(result.checkpoint).loras for tensor in lora.state.values()]
        loss = _last_loss(Path(folder) / "run" / "log.jsonl")
    ok = math.isfinite(loss) and bool(weights) and all(map(_is_nonzero, weights))
    yield compare("train", ok, f"loss {loss:.4f}, {len(weights)} LoRA tensors", "a finite loss and a trained LoRA")


def _last_loss(log: Path) -> float:
    import json

    return float(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["loss"])


def _is_nonzero(tensor: Any) -> bool:
    return bool(tensor.isfinite().all() and tensor.any())


def _summary(states: Any) -> str:
    finite = "finite" if states.isfinite().all() else "not finite"
    return f"{tuple(states.shape)}, {finite}, standard deviation {states.float().std():.3g}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: hides log messages of longalign below the level WARNING."""
    logger = logging.getLogger("longalign")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
