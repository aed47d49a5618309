"""Checkpoints on this machine and on the hub, looked at without loading them; importing it does not import torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from longalign.files import CHECKPOINT, HUB_ID
from longalign.runtime import resolve_checkpoint

#: what is said where a checkpoint of longalign is expected
BASE_MODEL = (
    "{} is a base model, not a checkpoint of longalign: give it as backbone.checkpoint of a config (--config), or "
    "sample with it as it is (--pipeline)"
)
#: files that a folder in diffusers layout has
LAYOUT = ("model_index.json", "unet/config.json", "transformer/config.json")


def offline() -> bool:
    """Whether the environment forbids to ask the hub, as huggingface_hub reads it."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def local_file(checkpoint: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a checkpoint that is on this machine: in a folder, bundled, or in the hub's cache; None if it is not.

    Raises:
        ValueError: if there are no bundled weights of that name.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    snapshot = Path(checkpoint) if Path(checkpoint).exists() else _cached(checkpoint, revision)
    return snapshot / file if snapshot is not None and (snapshot / file).is_file() else None


def read_json(checkpoint: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a checkpoint that is on this machine; empty if it is not, or cannot be read."""
    try:
        path = local_file(checkpoint, file, revision)
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def absent(checkpoint: str, revision: str | None = None) -> str:
    """Why a checkpoint cannot be there, or an empty text. The hub is not asked."""
    try:
        place = resolve_checkpoint(checkpoint)
    except ValueError as error:
        return str(error)
    if Path(place).exists():
        return ""
    if not HUB_ID.fullmatch(place):
        return f"there is no file or folder '{checkpoint}', and an id on the hub is written owner/name"
    if offline() and _cached(place, revision) is None:
        return f"'{checkpoint}' is not on this machine, and HF_HUB_OFFLINE forbids to download it"
    return ""


def incomplete(checkpoint: str, files: list[str], revision: str | None = None) -> str:
    """That a local folder lacks all of some files, or an empty text."""
    if absent(checkpoint, revision) or not Path(resolve_checkpoint(checkpoint)).is_dir():
        return ""
    if any(local_file(checkpoint, file, revision) for file in files):
        return ""
    return f"'{checkpoint}' does not hold {' or '.join(files)}"


def is_base_model(checkpoint: str) -> bool:
    """Whether a folder, bundled checkpoint or cached repository is one in diffusers layout."""
    try:
        # a checkpoint of ours that trained all weights has some of these folders too
        return not local_file(checkpoint, CHECKPOINT) and any(local_file(checkpoint, file) for file in LAYOUT)
    except ValueError:
        return False


def why(error: BaseException, file: str = "") -> str:
    """What stood against a download, in one sentence: the hub was not reached, has no such repository or file, or wants
    a login. The text of the error itself where it is of another kind.

    Args:
        error: what was raised, perhaps because of another error.
        file: what was asked for.
    """
    from huggingface_hub import errors

    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__

    def caused(*names: str) -> bool:
        kinds = tuple(getattr(errors, name) for name in names if hasattr(errors, name))
        return any(isinstance(e, kinds) for e in chain)

    if caused("GatedRepoError"):
        return "its owner asks for a consent: accept it on its page of the hub, then log in with `hf auth login`"
    if caused("RepositoryNotFoundError"):
        return "the hub has no such repository, or it is private; check its spelling, or log in with `hf auth login`"
    if caused("RevisionNotFoundError"):
        return "it has no such revision"
    if offline() or caused("OfflineModeIsEnabled"):
        return "it is not on this machine, and HF_HUB_OFFLINE forbids to download it"
    if caused("LocalEntryNotFoundError") or any(isinstance(e, (ConnectionError, TimeoutError)) for e in chain):
        return "it is not on this machine, and the hub cannot be reached"
    if caused("EntryNotFoundError"):
        return f"it does not hold {file or 'the files that are needed there'}"
    return str(error)


def _cached(repository: str, revision: str | None) -> Path | None:
    """The newest snapshot of a model in the hub's cache, whose layout is documented; None if there is none."""
    if not HUB_ID.fullmatch(repository):
        return None
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()
    folder = cache / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision or ""
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None
