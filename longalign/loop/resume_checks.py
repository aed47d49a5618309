"""Checks whether a run may be resumed: same config, same weights and data, same number of processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from longalign.checkpoints.provenance import versions
from longalign.checkpoints.redaction import redacted
from longalign.compose import Composition
from longalign.config.changes import diff, flatten
from longalign.config.run import RunConfig, load_config, to_dict
from longalign.data.base import Data, spread_indices
from longalign.data.stream import Stream
from longalign.files.fingerprint import fingerprint, fingerprints
from longalign.files.paths import find_checkpoint
from longalign.files.store import key_of
from longalign.loop.resume_state import ResumeState

log = logging.getLogger("longalign")

#: config keys that may change on resume without affecting results
RESUMABLE_KEYS = (
    "loop.steps",
    "loop.save_every",
    "loop.keep",
    "loop.log_every",
    "loop.trackers",
    "loop.workers",
    "monitor",
    "cache",
)

#: subfolders of a checkpoint in diffusers layout that a run may read
SUBFOLDERS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def check_resumable(state: ResumeState, composition: Composition, num_processes: int) -> None:
    """Checks that a run can be resumed from ``state``, and warns about each allowed change of its config.

    Args:
        state: the training state in a checkpoint.
        composition: the config and the built parts of the run that resumes.
        num_processes: number of processes of this run.

    Raises:
        ValueError: if the number of processes has changed, if a key that is not in `RESUMABLE_KEYS` has changed, or if
            the data is a stream and ``loop.workers`` has changed.
    """
    changes = check_same_run(state.config, composition.config)
    if "loop.workers" in changes and isinstance(composition.data, Stream):
        raise ValueError(
            f"loop.workers was {changes['loop.workers'][0]} in the checkpoint and is {changes['loop.workers'][1]} now, "
            f"which would repeat and omit items of a stream; set it to {changes['loop.workers'][0]}"
        )
    check_num_processes(state, num_processes)
    for key, (old, new) in changes.items():
        log.warning("the config key %s was %r in the checkpoint and is %r now", key, old, new)


def check_same_run(saved: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the allowed changes ``{key: (old, new)}`` since a run's checkpoint, except that of ``output``.

    Args:
        saved: config in the checkpoint.
        config: config of the run that resumes.

    Raises:
        ValueError: if keys that are not in `RESUMABLE_KEYS` have changed; the message lists them.
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


def check_num_processes(state: ResumeState, processes: int) -> None:
    """Raises ValueError unless the checkpoint was written by the same number of processes."""
    if state.shared["processes"] != processes:
        raise ValueError(
            f"{state.checkpoint} was written by {state.shared['processes']} processes, and {processes} are running; "
            f"resume with {state.shared['processes']} processes"
        )


def input_fingerprints(config: RunConfig, data: Any, buckets: Sequence[int] | None = None) -> dict[str, Any]:
    """Returns fingerprints of the files that a config refers to: hashes that change if the content changes.

    Args:
        config: config of the run.
        data: the built data.
        buckets: result of `longalign.loop.batches.read_buckets`.

    Returns:
        ``{"weights": {config key: fingerprint}, "data": {...}}``. The fingerprint of a Hub id is the downloaded commit.
        For the data: number of items, a hash of selected prompts, and a hash of ``buckets`` if it is not None. A stream
        has no entry ``data``.
    """
    config_dict = to_dict(config)
    parts = {key: config_dict[key] for key in ("backbone", "encoder", "rewards")}
    weights = fingerprints(parts, SUBFOLDERS, ask_hub=False)
    if config.init_from is not None:
        weights["init_from"] = fingerprint(str(find_checkpoint(config.init_from)), None, None, SUBFOLDERS)
    if not isinstance(data, Data):
        return {"weights": weights}
    prompts = [data.prompt(i) for i in spread_indices(len(data))]
    contents = {"items": len(data), "prompts": key_of(json.dumps(prompts)).hex()}
    if buckets is not None:
        contents["buckets"] = key_of(json.dumps(list(buckets))).hex()
    return {"weights": weights, "data": contents}


def check_same_inputs(state: ResumeState, current: Mapping[str, Any]) -> None:
    """Raises an error if weights or data have changed since the run was started, and warns of other package versions.

    Args:
        state: the training state in a checkpoint.
        current: result of `input_fingerprints` for the run that resumes.

    Raises:
        ValueError: if fingerprints have changed; the message lists them.
    """
    for package, version in versions().items():
        if state.versions.get(package, version) != version:
            log.warning(
                "the run was started with %s %s and continues with %s; results may differ",
                package,
                state.versions[package],
                version,
            )
    saved = dict(flatten(state.shared["origin"]))
    changed = [
        f"  {key}: {saved[key]} then, {value} now"
        for key, value in flatten(current)
        if value is not None and saved.get(key) not in (None, value)
    ]
    if changed:
        raise ValueError(
            f"weights or data of {state.checkpoint} have changed on disk since the start:\n" + "\n".join(changed) + "\n"
            "Restore them, or start a new run from the checkpoint's weights with init_from"
        )
