"""Finds files of local and Hub checkpoints without loading weights. Importing this module does not import torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from longalign.runtime import resolve_checkpoint

__all__ = ["checkpoint_problem", "find_checkpoint_file"]

CHECKPOINT = "longalign.safetensors"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
#: message if a longalign checkpoint was expected; ``{}`` is the given checkpoint
BASE_MODEL = (
    "{} is a base model, not a checkpoint of longalign: set it as backbone.checkpoint in a config (--config), or "
    "sample with the unmodified model (--pipeline)"
)
#: files of which a checkpoint in diffusers layout has at least one
LAYOUT = ("model_index.json", "unet/config.json", "transformer/config.json")


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` disables downloads, by the rules of huggingface_hub."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def cache_folder() -> Path:
    """Returns the folder in which huggingface_hub caches downloads, which may not exist yet."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()


def local_file(checkpoint: str, file: str, revision: str | None = None) -> Path | None:
    """Returns the path of a checkpoint's file without downloading it; None if the file is not on this machine.

    Args:
        checkpoint: local folder, bundled weights (``mini/<folder>``), or Hub id.
        file: path of the file in the checkpoint.
        revision: branch, tag or commit on the Hub; None for ``main``.

    Raises:
        ValueError: if ``checkpoint`` starts with ``mini``, but no bundled weights have that name.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    snapshot = Path(checkpoint) if Path(checkpoint).exists() else _cached(checkpoint, revision)
    return snapshot / file if snapshot is not None and (snapshot / file).is_file() else None


def find_checkpoint_file(checkpoint: str, file: str, revision: str | None = None) -> Path | None:
    """Returns the path of a checkpoint's file, downloaded if needed; None if the checkpoint has no such file.

    Args:
        checkpoint: local folder, bundled weights (``mini/<folder>``), or Hub id.
        file: path of the file in the checkpoint.
        revision: branch, tag or commit on the Hub; None for ``main``.

    Raises:
        ValueError: if the Hub repository does not exist or cannot be reached, or no bundled weights have that name.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    checkpoint = resolve_checkpoint(checkpoint)
    if Path(checkpoint).exists():
        path = Path(checkpoint) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(checkpoint, file, revision=revision))
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise ValueError(
            f"'{checkpoint}' is not a local folder and could not be loaded from the Hub: "
            f"{download_problem(error, file)}; check the Hub id, or pass a local folder"
        ) from error


def read_json(checkpoint: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """Returns the content of a checkpoint's JSON file; empty if the file is missing, unreadable or no JSON mapping.

    Nothing is downloaded. The arguments are those of `local_file`.
    """
    try:
        path = local_file(checkpoint, file, revision)
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def availability_problem(checkpoint: str, revision: str | None = None) -> str:
    """Returns why a checkpoint cannot be loaded, or an empty string if no problem is known.

    The Hub is not queried, so a repository that does not exist is not noticed.


    Args:
        checkpoint: local folder or file, bundled weights (``mini/<folder>``), or Hub id.
        revision: branch, tag or commit on the Hub; None for ``main``.
    """
    try:
        source = resolve_checkpoint(checkpoint)
    except ValueError as error:
        return str(error)
    if Path(source).exists():
        return ""
    if not HUB_ID.fullmatch(source):
        return f"no file or folder '{checkpoint}'; expected an existing path, or a Hub id of the form owner/name"
    if offline() and _cached(source, revision) is None:
        return (
            f"'{checkpoint}' is not on this machine, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE disables downloads; "
            "unset them"
        )
    return ""


def checkpoint_problem(checkpoint: str, files: list[str], revision: str | None = None) -> str:
    """Returns why a checkpoint cannot be loaded, or an empty string.

    Besides the problems that `availability_problem` finds, a local folder that contains none of ``files`` is a problem.
    For a Hub id, the files are not checked.
    """
    if problem := availability_problem(checkpoint, revision):
        return problem
    if not Path(resolve_checkpoint(checkpoint)).is_dir() or any(
        local_file(checkpoint, file, revision) for file in files
    ):
        return ""
    return f"'{checkpoint}' does not contain {' or '.join(files)}"


def is_base_model(checkpoint: str) -> bool:
    """Whether a checkpoint is a model in diffusers layout that longalign has not written.

    False if its files are not on this machine.
    """
    try:
        # fully fine-tuned longalign checkpoints have some of these files too
        return not local_file(checkpoint, CHECKPOINT) and any(local_file(checkpoint, file) for file in LAYOUT)
    except ValueError:
        return False


def download_problem(error: BaseException, file: str = "") -> str:
    """Returns the reason of a failed download in one sentence, or the error's own text if the reason is not known.

    Args:
        error: the error; the errors that caused it are examined too.
        file: the requested file, for the message; empty if it is not known.
    """
    from huggingface_hub import errors

    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__

    def caused(*names: str) -> bool:
        kinds = tuple(getattr(errors, name) for name in names if hasattr(errors, name))
        return any(isinstance(e, kinds) for e in chain)

    if caused("GatedRepoError"):
        return "it is gated: accept its conditions on its Hub page, then log in with `hf auth login`"
    if caused("RepositoryNotFoundError"):
        return "the Hub has no such repository, or it is private; check the spelling, or log in with `hf auth login`"
    if caused("RevisionNotFoundError"):
        return "it has no such revision"
    if offline() or caused("OfflineModeIsEnabled"):
        return "it is not on this machine, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE disables downloads; unset them"
    if caused("LocalEntryNotFoundError") or any(isinstance(e, (ConnectionError, TimeoutError)) for e in chain):
        return "it is not on this machine, and the Hub cannot be reached"
    if caused("EntryNotFoundError"):
        return f"it does not contain {file or 'the files that are needed'}"
    return str(error)


def _cached(repository: str, revision: str | None) -> Path | None:
    """Returns the folder of a repository's revision in the Hub cache; None if it is not cached."""
    if not HUB_ID.fullmatch(repository):
        return None
    folder = cache_folder() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision or ""
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None
