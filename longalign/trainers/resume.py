"""What an interrupted run needs to go on exactly: everything that is neither in the config nor in the weights file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longalign.config import RunConfig, diff
from longalign.sharding import share, share_state, whole, whole_state

if TYPE_CHECKING:
    from longalign.trainers.loop import Run

#: what may change between the two parts of a run without changing its numbers
FREE = (
    "loop.steps",
    "loop.save_every",
    "loop.keep",
    "loop.log_every",
    "loop.trackers",
    "loop.workers",
    "validation",
    "cache",
)

FOLDER = "resume"


def random_state() -> dict[str, Any]:
    """The states of all global random generators of this process."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    found = [p for p in output.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def publish(unfinished: Path, final: Path, keep: int | None) -> None:
    """Gives a complete checkpoint its name and removes those beyond the newest ``keep``."""
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)
    if keep is not None:
        for old in checkpoints(final.parent)[:-keep]:
            shutil.rmtree(old)


def check_same_run(saved: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What differs from the checkpoint's config and may; raises for what may not.

    Raises:
        ValueError: naming each key whose change would make another run of this one.
    """
    changes = {k: v for k, v in diff(saved, config).items() if k != "output"}
    refused = {k: v for k, v in changes.items() if not any(k == free or k.startswith(f"{free}.") for free in FREE)}
    if refused:
        lines = "\n".join(f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in refused.items())
        raise ValueError(
            f"this run cannot go on from a checkpoint of another config:\n{lines}\n"
            "Change these back, or start a new run from the checkpoint's weights with init_from"
        )
    return changes


def load_state(checkpoint: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shared state and that of one process from a checkpoint's folder.

    Raises:
        ValueError: if the checkpoint cannot be resumed, or not on this number of processes.
    """
    folder = checkpoint / FOLDER
    if not (folder / "shared.pt").is_file():
        raise ValueError(f"{checkpoint} has no {FOLDER}/ folder, so it can only be started from, with init_from")
    # Mapped, since each process of several reads it and keeps a share.
    shared = torch.load(folder / "shared.pt", map_location="cpu", weights_only=True, mmap=True)
    own = folder / f"process-{rank}.pt"
    if not own.is_file():
        raise ValueError(f"{checkpoint} was written by fewer processes than are running; use as many")
    return shared, torch.load(own, map_location="cpu", weights_only=True)


def collect(run: Run) -> dict[str, Any]:
    """What the first process writes for all of them. Where weights are split over processes all must call it, and only
    the first gets the whole of it."""
    ema = None if run.ema is None else run.ema.state_dict()
    buffers = dict(run.trainer.named_buffers())
    scaler = run.accelerator.scaler
    return {
        "step": run.step,
        "processes": run.accelerator.num_processes,
        "parameters": [whole(p.detach()) for p in run.parameters],
        "buffers": {k: v for k, v in run.trainer.state_dict().items() if k in buffers},
        "optimizer": whole_state(run.optimizer.state_dict()),
        "rates": {k: v for k, v in run.rates.state_dict().items() if k != "lr_lambdas"},
        "ema": None if ema is None else {**ema, "shadow_params": [whole(p) for p in ema["shadow_params"]]},
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def restore(run: Run, checkpoint: Path) -> None:
    """Brings a run to where it was when it wrote a checkpoint.

    Raises:
        ValueError: if the checkpoint cannot be resumed, or not on this number of processes.
    """
    shared, own = load_state(checkpoint, run.accelerator.process_index)
    if shared["processes"] != run.accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {shared['processes']} processes, and {run.accelerator.num_processes} are "
            "running; use as many"
        )
    with torch.no_grad():
        for parameter, saved in zip(run.parameters, shared["parameters"], strict=True):
            parameter.copy_(share(saved, parameter))
    run.trainer.load_state_dict(shared["buffers"], strict=False)
    run.optimizer.load_state_dict(share_state(shared["optimizer"], run.parameters))
    run.rates.load_state_dict({**run.rates.state_dict(), **shared["rates"]})
    if run.ema is not None:
        averages = zip(shared["ema"]["shadow_params"], run.parameters, strict=True)
        run.ema.load_state_dict({**shared["ema"], "shadow_params": [share(p, like) for p, like in averages]})
        run.ema.to(run.accelerator.device)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(shared["scaler"])
    run.step = shared["step"]
    set_random_state(own)
