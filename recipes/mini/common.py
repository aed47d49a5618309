"""Shared code of the recipes for the `mini` weights: batches of scenes, a resumable training loop, a log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from muon import Muon
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longalign.mini.captions import Caption, describe
from longalign.mini.scenes import Scene, render_batch, sample_scene

HERE = Path(__file__).parent
RUNS = Path("runs/mini")
WEIGHTS = HERE.parents[1] / "longalign" / "mini" / "weights"


def render_images(scenes: list[Scene]) -> Tensor:
    """Renders scenes: ``(b, 3, 64, 64)`` in [0, 1]."""
    return torch.from_numpy(render_batch(scenes))


def scene_and_caption(
    rng: np.random.Generator, num_things: tuple[int, int], words: tuple[int, int], referring: float = 0.0
) -> tuple[Scene, Caption]:
    """Samples a scene and its caption.

    Args:
        rng: random generator.
        num_things: lowest and highest number of objects.
        words: lowest and highest number of words of the caption.
        referring: probability of the caption style ``"referring"`` instead of ``"plain"``.
    """
    scene = sample_scene(rng, num_things)
    style = "referring" if rng.random() < referring else "plain"
    return scene, describe(scene, rng, words=int(rng.integers(words[0], words[1] + 1)), style=style)


def load_or_compute(name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Loads ``runs/mini/<name>.pt``, or computes it with ``compute`` and saves it."""
    path = RUNS / f"{name}.pt"
    if not path.exists():
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(compute(), path)
    return torch.load(path, weights_only=True)


def render_uint8(scenes: list[Scene]) -> Tensor:
    """Renders scenes: ``(n, 3, 64, 64)`` uint8."""
    chunks = [scenes[i : i + 500] for i in range(0, len(scenes), 500)]
    return torch.cat([(render_images(chunk) * 255).round().to(torch.uint8) for chunk in chunks])


def publish_text_encoder() -> None:
    """Renames the text model's weights to the names of published checkpoints, and sets float32 in its config.

    transformers 5 saves the weights without prefix, and transformers 4 would then use random weights instead. The dtype
    in the config determines the dtype in transformers 5, while diffusers loads the other parts in float32.
    """
    path = WEIGHTS / "sd" / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    config = path.with_name("config.json")
    settings = {**json.loads(config.read_text()), "dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def train(
    name: str,
    modules: nn.Module,
    compute_loss: Callable[[int, np.random.Generator], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    muon: float = 10.0,
    outer: tuple[str, ...] = (),
    weight_decay: float = 0.01,
    clip: float = 1.0,
    log_every: int = 50,
    save_every: int = 200,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 500,
    ema: float | None = None,
) -> nn.Module:
    """Trains ``modules`` with Muon and a cosine schedule; resumes an interrupted call.

    ``compute_loss(step, rng)`` returns ``{"loss": ..., **metrics}``. Its generator depends only on the step, so a
    resumed run sees the same data. Metrics are logged to ``recipes/mini/logs/<name>.jsonl``.

    Args:
        name: name of the log and of the saved state ``runs/mini/<name>.pt``.
        modules: modules to train.
        compute_loss: the loss and metrics of a step.
        steps: number of optimizer steps.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        muon: Muon's learning rate as a multiple of ``lr``.
        outer: see `Muon`.
        weight_decay: decoupled weight decay.
        clip: maximum norm of the gradient.
        log_every: steps between log lines.
        save_every: steps between saved states.
        evaluate: returns metrics of held-out data.
        evaluate_every: steps between evaluations.
        ema: decay of the moving average of the weights; None for no average.

    Returns:
        The modules, with the averaged weights if ``ema`` is set.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    (HERE / "logs").mkdir(exist_ok=True)
    log_path, state_path = HERE / "logs" / f"{name}.jsonl", RUNS / f"{name}.pt"
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = Muon(modules, lr, muon, outer, weight_decay)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average = [p.detach().clone() for p in parameters] if ema else []
    start, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    else:
        log_path.unlink(missing_ok=True)
    print(f"{name}: {sum(p.numel() for p in parameters):,} parameters, from step {start} of {steps}", flush=True)
    sums: dict[str, float] = {}
    began = time.time()
    for step in range(start, steps):
        out = compute_loss(step, np.random.default_rng([len(name), step]))
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        for key, value in out.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        last = step + 1 == steps
        if (step + 1) % log_every == 0 or last:
            row = {"step": step + 1, "seconds": round(seconds + time.time() - began, 1)}
            row |= {key: round(value / ((step % log_every) + 1), 5) for key, value in sums.items()}
            sums = {}
            if evaluate and ((step + 1) % evaluate_every == 0 or last):
                current = _swap(parameters, average)
                modules.eval()
                with torch.no_grad():
                    row |= {key: round(value, 4) for key, value in evaluate().items()}
                modules.train()
                _swap(parameters, current)
            print(name, json.dumps(row), flush=True)
            with log_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if (step + 1) % save_every == 0 or last:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state |= {"schedule": schedule.state_dict(), "average": average, "seconds": seconds + time.time() - began}
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
    _swap(parameters, average)
    return modules.eval()


def _swap(parameters: list[nn.Parameter], values: list[Tensor]) -> list[Tensor]:
    """Copies ``values`` (if any) into the parameters and returns the previous values."""
    before = [p.detach().clone() for p in parameters] if values else []
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=False):
            parameter.copy_(value)
    return before
