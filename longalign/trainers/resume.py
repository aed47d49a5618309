"""What an interrupted run needs to go on exactly: everything that is neither in the config nor in the weights file."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longalign.checkpoint import redacted, versions
from longalign.config import RunConfig, diff, load_config, to_dict
from longalign.data.base import Data
from longalign.files import CHECKPOINT, find_checkpoint, read_metadata
from longalign.fingerprint import fingerprint, fingerprints
from longalign.sharding import gather_full, gather_optimizer_state, shard_like, shard_optimizer_state
from longalign.store import key_of
from longalign.trainers.folder import checkpoints
from longalign.weights import load_pickle, load_tensors, reading

if TYPE_CHECKING:
    from longalign.trainers.loop import Run

log = logging.getLogger("longalign")

#: what may change between the two parts of a run without changing its numbers
RESUMABLE_KEYS = (
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
#: what of a checkpoint in diffusers layout a run may read
PARTS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
#: items whose prompts stand for those of all
CHECKED = 32


#: keys of the two states
SHARED = {"step", "origin", "processes", "parameters", "buffers", "optimizer", "rates", "ema", "scaler"}
OWN = {"python", "numpy", "torch", "cuda", "means"}


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


def check_same_run(saved: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What differs from the checkpoint's config and may; raises for what may not.

    Raises:
        ValueError: naming each key whose change would make another run of this one.
    """
    # A checkpoint has no credentials, so they are not compared.
    now = load_config(redacted(to_dict(config)))
    changes = {k: v for k, v in diff(saved, now).items() if k != "output"}
    refused = {
        k: v for k, v in changes.items() if not any(k == free or k.startswith(f"{free}.") for free in RESUMABLE_KEYS)
    }
    if refused:
        lines = "\n".join(f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in refused.items())
        raise ValueError(
            f"this run cannot go on from a checkpoint of another config:\n{lines}\n"
            "Change these back, or start a new run from the checkpoint's weights with init_from"
        )
    return changes


@dataclass(frozen=True)
class State:
    """What of a checkpoint a run resumes from.

    Attributes:
        checkpoint: its folder.
        config: of the run that wrote it.
        versions: of the packages then.
        shared: what `collect` gave.
        own: by process, what it added.
    """

    checkpoint: Path
    config: RunConfig
    versions: dict[str, str]
    shared: dict[str, Any]
    own: list[dict[str, Any]]


def find(path: Path, output: Path) -> State | None:
    """The state in a checkpoint, or in the newest whole one of a run's folder; None if ``output`` has none yet.

    Damaged checkpoints are passed over with a warning, if they are a run's folder's and not asked for themselves.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: naming the file that is damaged, if no checkpoint is whole.
    """
    if path.is_file():
        path = path.parent
    if (path / CHECKPOINT).is_file():
        return load_state(path)
    found = checkpoints(path)
    first: Exception | None = None
    for checkpoint in reversed(found):
        try:
            return load_state(checkpoint)
        except (ValueError, OSError) as error:
            first = first or error
            log.warning("%s cannot be resumed from: %s", checkpoint.name, error)
    if first is not None:
        raise first
    if path.resolve() != output.resolve():
        raise FileNotFoundError(f"no checkpoint in {path}; expected {CHECKPOINT} or checkpoint-<step>/ there")
    return None


def load_state(checkpoint: Path) -> State:
    """Reads all of a checkpoint.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    path, folder = checkpoint / CHECKPOINT, checkpoint / FOLDER
    config = load_config(path)
    if not (folder / "shared.pt").is_file():
        raise ValueError(f"{checkpoint} has no {FOLDER}/ folder, so it can only be started from, with init_from")
    load_tensors(path)
    # Mapped, since each process of several reads it and keeps a share.
    shared = load_pickle(folder / "shared.pt", checked=True)
    if not isinstance(shared, dict) or not shared.keys() >= SHARED:
        raise ValueError(f"{folder / 'shared.pt'} is not the state of a run; expected {', '.join(sorted(SHARED))}")
    own = []
    for rank in range(int(shared["processes"])):
        file = folder / f"process-{rank}.pt"
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; it was written by {shared['processes']} processes")
        own.append(load_pickle(file, checked=True))
        if not isinstance(own[-1], dict) or not own[-1].keys() >= OWN:
            raise ValueError(f"{file} is not the state of a process; expected {', '.join(sorted(OWN))}")
    with reading(path):
        return State(checkpoint, config, json.loads(read_metadata(path).get("versions", "{}")), shared, own)


def collect(run: Run) -> dict[str, Any]:
    """What the first process writes for all of them. Where weights are split over processes all must call it, and only
    the first gets the whole of it."""
    ema = None if run.ema is None else run.ema.state_dict()
    buffers = dict(run.trainer.named_buffers())
    scaler = run.accelerator.scaler
    return {
        "step": run.step,
        "origin": run.origin,
        "processes": run.accelerator.num_processes,
        "parameters": [gather_full(p.detach()) for p in run.parameters],
        "buffers": {k: v for k, v in run.trainer.state_dict().items() if k in buffers},
        "optimizer": gather_optimizer_state(run.optimizer.state_dict()),
        "rates": {k: v for k, v in run.rates.state_dict().items() if k != "lr_lambdas"},
        "ema": None if ema is None else {**ema, "shadow_params": [gather_full(p) for p in ema["shadow_params"]]},
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def own_state(run: Run) -> dict[str, Any]:
    """What each process writes."""
    return {**random_state(), "means": run.means.state()}


def origin(config: RunConfig, data: Any) -> dict[str, Any]:
    """What stands behind a config: fingerprints of the weights that it names, and of the data's prompts.

    Of a hub id it is the downloaded commit. Of a stream there is none.
    """
    named = to_dict(config)
    parts = {key: named[key] for key in ("backbone", "encoder", "rewards")}
    weights = fingerprints(parts, PARTS, ask_hub=False)
    if config.init_from is not None:
        weights["init_from"] = fingerprint(str(find_checkpoint(config.init_from)), None, None, PARTS)
    if not isinstance(data, Data):
        return {"weights": weights}
    count = len(data)
    some = [data.prompt(i) for i in sorted({i * (count - 1) // (CHECKED - 1) for i in range(CHECKED)}) if count]
    return {"weights": weights, "data": {"items": count, "prompts": key_of(json.dumps(some)).hex()}}


def check_same_origin(state: State, now: Mapping[str, Any]) -> None:
    """Warns of other versions; raises for other weights or data, which a config does not tell.

    Raises:
        ValueError: naming what has changed.
    """
    for package, version in versions().items():
        if state.versions.get(package, version) != version:
            log.warning("%s was %s when the run was started and is %s now", package, state.versions[package], version)
    before = dict(_flat("", state.shared["origin"]))
    changed = [
        f"  {key}: {before[key]} then, {value} now"
        for key, value in _flat("", now)
        if value is not None and before.get(key) not in (None, value)
    ]
    if changed:
        raise ValueError(
            f"what {state.checkpoint} was trained with has changed on disk since:\n" + "\n".join(changed) + "\n"
            "Put it back, or start a new run from the checkpoint's weights with init_from"
        )


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flat(f"{path}.{key}" if path else key, child)
    else:
        yield path, value


def check_processes(state: State, processes: int) -> None:
    """Raises ValueError unless as many processes are running as wrote a checkpoint."""
    if state.shared["processes"] != processes:
        raise ValueError(
            f"{state.checkpoint} was written by {state.shared['processes']} processes, and {processes} are running; "
            "use as many"
        )


def restore(run: Run, state: State) -> None:
    """Brings a run to where it was when it wrote a checkpoint.

    Raises:
        ValueError: if the state is that of other parameters.
    """
    shared, own = state.shared, state.own[run.accelerator.process_index]
    shapes = [tuple(saved.shape) for saved in shared["parameters"]]
    if shapes != [tuple(parameter.shape) for parameter in run.parameters]:
        raise ValueError(f"{state.checkpoint} holds the state of other parameters than this config trains")
    with torch.no_grad():
        for parameter, saved in zip(run.parameters, shared["parameters"], strict=True):
            parameter.copy_(shard_like(saved, parameter))
    run.trainer.load_state_dict(shared["buffers"], strict=False)
    run.optimizer.load_state_dict(shard_optimizer_state(shared["optimizer"], run.parameters))
    run.rates.load_state_dict({**run.rates.state_dict(), **shared["rates"]})
    if run.ema is not None:
        averages = zip(shared["ema"]["shadow_params"], run.parameters, strict=True)
        run.ema.load_state_dict({**shared["ema"], "shadow_params": [shard_like(p, like) for p, like in averages]})
        run.ema.to(run.accelerator.device)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(shared["scaler"])
    run.step = shared["step"]
    run.means.load(own["means"], run.accelerator.device)
    set_random_state(own)
