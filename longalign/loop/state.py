"""The training state that resumes a run exactly: everything that is neither in the config nor in the weights file."""

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

from longalign.caching.fingerprint import fingerprint, fingerprints
from longalign.caching.store import key_of
from longalign.checkpoints.provenance import versions
from longalign.checkpoints.redaction import redacted
from longalign.checkpoints.weights import load_pickle, load_tensors, reading
from longalign.config.files import CHECKPOINT, find_checkpoint, read_metadata
from longalign.config.run import RunConfig, diff, load_config, to_dict
from longalign.data.base import Data
from longalign.loop.folder import checkpoints
from longalign.sharding import gather_full, gather_optimizer_state, shard_like, shard_optimizer_state

if TYPE_CHECKING:
    from longalign.loop.run import Run

log = logging.getLogger("longalign")

#: config keys that may change on resume without affecting results
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
#: subfolders of a checkpoint in diffusers layout that a run may read
SUBFOLDERS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
#: number of prompts that the data's fingerprint samples
NUM_CHECKED_PROMPTS = 32

#: keys of the state shared by all processes, and of that of each process
SHARED_KEYS = {"step", "origin", "processes", "parameters", "buffers", "optimizer", "rates", "ema", "scaler"}
PROCESS_KEYS = {"python", "numpy", "torch", "cuda", "means"}


def random_state() -> dict[str, Any]:
    """Returns the states of all global random generators of this process."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores the result of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def check_same_run(saved: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the changes ``{key: (old, new)}`` since the checkpoint's config that are allowed on resume.

    Raises:
        ValueError: listing the changed keys that are not in `RESUMABLE_KEYS`.
    """
    # Checkpoints contain no credentials, so credentials are not compared.
    current = load_config(redacted(to_dict(config)))
    changes = {key: change for key, change in diff(saved, current).items() if key != "output"}
    rejected = {
        key: change
        for key, change in changes.items()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in RESUMABLE_KEYS)
    }
    if rejected:
        lines = "\n".join(f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in rejected.items())
        raise ValueError(
            f"this run cannot be resumed from a checkpoint with a different config:\n{lines}\n"
            "Change these keys back, or start a new run from the checkpoint's weights with init_from"
        )
    return changes


@dataclass(frozen=True)
class ResumeState:
    """The training state in a checkpoint.

    Attributes:
        checkpoint: folder of the checkpoint.
        config: config of the run that wrote it.
        versions: package versions of that run.
        shared: the result of `shared_state`.
        by_process: the result of `process_state` of each process.
    """

    checkpoint: Path
    config: RunConfig
    versions: dict[str, str]
    shared: dict[str, Any]
    by_process: list[dict[str, Any]]


def find_state(path: Path, output: Path) -> ResumeState | None:
    """Loads the state of a checkpoint, or of the newest intact checkpoint in a run's folder.

    In a run's folder, damaged checkpoints are skipped with a warning.

    Args:
        path: a checkpoint, its file, or a run's folder.
        output: the run's output folder.

    Returns:
        The state, or None if ``path`` is ``output`` and has no checkpoint yet.

    Raises:
        FileNotFoundError: if ``path`` has no checkpoint and is not ``output``.
        ValueError: naming the damaged file, if no checkpoint is intact.
    """
    if path.is_file():
        path = path.parent
    if (path / CHECKPOINT).is_file():
        return load_state(path)
    newest_error: Exception | None = None
    for checkpoint in reversed(checkpoints(path)):
        try:
            return load_state(checkpoint)
        except (ValueError, OSError) as error:
            newest_error = newest_error or error
            log.warning("%s cannot be resumed from: %s", checkpoint.name, error)
    if newest_error is not None:
        raise newest_error
    if path.resolve() != output.resolve():
        raise FileNotFoundError(f"no checkpoint in {path}; expected {CHECKPOINT} or checkpoint-<step>/ there")
    return None


def load_state(checkpoint: Path) -> ResumeState:
    """Loads the state of a checkpoint, and checks that its weights file can be read too.

    Raises:
        ValueError: naming the missing or damaged file.
    """
    path, folder = checkpoint / CHECKPOINT, checkpoint / FOLDER
    config = load_config(path)
    if not (folder / "shared.pt").is_file():
        raise ValueError(
            f"{checkpoint} has no {FOLDER}/ folder, so it cannot be resumed; start a new run from its weights with "
            "init_from"
        )
    load_tensors(path)
    # memory-mapped, since every process reads the file and keeps only its shard
    shared = load_pickle(folder / "shared.pt", checked=True)
    if not isinstance(shared, dict) or not shared.keys() >= SHARED_KEYS:
        expected = ", ".join(sorted(SHARED_KEYS))
        raise ValueError(f"{folder / 'shared.pt'} is not the state of a run; expected the keys {expected}")
    by_process = []
    for rank in range(int(shared["processes"])):
        file = folder / f"process-{rank}.pt"
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; it was written by {shared['processes']} processes")
        state = load_pickle(file, checked=True)
        if not isinstance(state, dict) or not state.keys() >= PROCESS_KEYS:
            expected = ", ".join(sorted(PROCESS_KEYS))
            raise ValueError(f"{file} is not the state of a process; expected the keys {expected}")
        by_process.append(state)
    with reading(path):
        saved_versions = json.loads(read_metadata(path).get("versions", "{}"))
    return ResumeState(checkpoint, config, saved_versions, shared, by_process)


def shared_state(run: Run) -> dict[str, Any]:
    """Returns the state that the first process writes for all.

    With FSDP every process must call it, and only the first gets the full tensors.
    """
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
        "rates": {k: v for k, v in run.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
        "ema": None if ema is None else {**ema, "shadow_params": [gather_full(p) for p in ema["shadow_params"]]},
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def process_state(run: Run) -> dict[str, Any]:
    """Returns the state that each process writes."""
    return {**random_state(), "means": run.means.state()}


def input_fingerprints(config: RunConfig, data: Any) -> dict[str, Any]:
    """Returns fingerprints of the weights that a config refers to and of the data's prompts.

    The fingerprint of a Hub id is the downloaded commit. Streams have no fingerprint.
    """
    config_dict = to_dict(config)
    parts = {key: config_dict[key] for key in ("backbone", "encoder", "rewards")}
    weights = fingerprints(parts, SUBFOLDERS, ask_hub=False)
    if config.init_from is not None:
        weights["init_from"] = fingerprint(str(find_checkpoint(config.init_from)), None, None, SUBFOLDERS)
    if not isinstance(data, Data):
        return {"weights": weights}
    count = len(data)
    indices = {i * (count - 1) // (NUM_CHECKED_PROMPTS - 1) for i in range(NUM_CHECKED_PROMPTS)} if count else ()
    prompts = [data.prompt(i) for i in sorted(indices)]
    return {"weights": weights, "data": {"items": count, "prompts": key_of(json.dumps(prompts)).hex()}}


def check_same_inputs(state: ResumeState, current: Mapping[str, Any]) -> None:
    """Warns if package versions have changed; raises if weights or data have changed under the same config.

    Args:
        state: the state to resume from.
        current: the present `input_fingerprints`.

    Raises:
        ValueError: listing the changed fingerprints.
    """
    for package, version in versions().items():
        if state.versions.get(package, version) != version:
            log.warning("%s was %s when the run was started and is %s now", package, state.versions[package], version)
    saved = dict(_flatten("", state.shared["origin"]))
    changed = [
        f"  {key}: {saved[key]} then, {value} now"
        for key, value in _flatten("", current)
        if value is not None and saved.get(key) not in (None, value)
    ]
    if changed:
        raise ValueError(
            f"weights or data of {state.checkpoint} have changed on disk since:\n" + "\n".join(changed) + "\n"
            "Restore them, or start a new run from the checkpoint's weights with init_from"
        )


def _flatten(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flatten(f"{path}.{key}" if path else key, child)
    else:
        yield path, value


def check_num_processes(state: ResumeState, processes: int) -> None:
    """Raises ValueError unless the checkpoint was written by the same number of processes."""
    if state.shared["processes"] != processes:
        raise ValueError(
            f"{state.checkpoint} was written by {state.shared['processes']} processes, and {processes} are running; "
            f"resume with {state.shared['processes']} processes"
        )


def restore_state(run: Run, state: ResumeState) -> None:
    """Restores the training state from a checkpoint.

    Raises:
        ValueError: if the shapes of the saved and the trainable parameters differ.
    """
    shared, process = state.shared, state.by_process[run.accelerator.process_index]
    shapes = [tuple(saved.shape) for saved in shared["parameters"]]
    if shapes != [tuple(parameter.shape) for parameter in run.parameters]:
        raise ValueError(f"the parameters in {state.checkpoint} have different shapes from those this config trains")
    with torch.no_grad():
        for parameter, saved in zip(run.parameters, shared["parameters"], strict=True):
            parameter.copy_(shard_like(saved, parameter))
    run.trainer.load_state_dict(shared["buffers"], strict=False)
    run.optimizer.load_state_dict(shard_optimizer_state(shared["optimizer"], run.parameters))
    run.lr_scheduler.load_state_dict({**run.lr_scheduler.state_dict(), **shared["rates"]})
    if run.ema is not None:
        averages = zip(shared["ema"]["shadow_params"], run.parameters, strict=True)
        run.ema.load_state_dict({**shared["ema"], "shadow_params": [shard_like(p, like) for p, like in averages]})
        run.ema.to(run.accelerator.device)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(shared["scaler"])
    run.step = shared["step"]
    run.means.load(process["means"], run.accelerator.device)
    set_random_state(process)
