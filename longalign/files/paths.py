"""Finds the files of a checkpoint and reads their metadata. Importing this module does not import torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from longalign import hub
from longalign.errors import ConfigError, shorten
from longalign.hub import CHECKPOINT, HUB_ID

#: name of a checkpoint folder in a run, before the step
PREFIX = "checkpoint-"
#: link in a run's folder to its best checkpoint
BEST = "best"
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
#: model card of an exported checkpoint
CARD = "README.md"
#: folder of a trained reward inside a checkpoint
REWARD = "reward"


def join_subfolder(subfolder: str | None, folder: str) -> str:
    """Returns the path in a checkpoint of a folder such as ``vae``: ``subfolder/folder``.

    Without a subfolder (None or empty), it is ``folder``.
    """
    return f"{subfolder}/{folder}" if subfolder else folder


def check_single_file(checkpoint: str, layout: str | None, **selection: str | None) -> None:
    """Checks that a part's config keys apply to its checkpoint: a ``.safetensors`` file, or a folder or repository.

    Args:
        checkpoint: path of the file or folder, or ``owner/name`` on the Hub.
        layout: value of the key ``layout``, which only applies to a single file; None if it is not set.
        **selection: values of keys such as ``subfolder`` and ``revision``, which only apply to a folder or
            repository; None if a key is not set.

    Raises:
        ValueError: if the checkpoint is a ``.ckpt`` file (a pickle), or a key that is set does not apply.
    """
    if checkpoint.endswith(".ckpt"):
        raise ValueError("a .ckpt file is a pickle, which can run code, so it is not read; convert it to .safetensors")
    is_file = checkpoint.endswith(".safetensors")
    if layout is not None and not is_file:
        raise ValueError("'layout' describes a single .safetensors file; remove it for a folder or repository")
    if is_file and (keys := [f"'{key}'" for key, value in selection.items() if value is not None]):
        raise ValueError(
            f"'checkpoint' is a single file, and {' and '.join(keys)} only apply to a folder or Hub repository; "
            "remove them"
        )


def check_folder(folder: Path) -> None:
    """Raises ValueError if ``folder``, or one of its parents, is a file. The folder need not exist."""
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"{path} is a file; expected a folder, so choose a different path")
            return


def check_unexported(folder: Path) -> None:
    """Raises ValueError if a folder contains files of an export, or if ``folder`` or one of its parents is a file.

    Files of an export are ``longalign.safetensors`` and the model card ``README.md``.
    """
    check_folder(folder)
    for name in (CHECKPOINT, CARD):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} exists; choose a different folder, or set overwrite (--overwrite)")


def checkpoints(run: Path) -> list[Path]:
    """Returns the folders ``checkpoint-<step>`` in the folder of a run, by increasing step."""
    return sorted((p for p in run.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the training step in the name of a checkpoint folder, e.g. 500 for ``checkpoint-000500``."""
    return int(checkpoint.name.removeprefix(PREFIX))


def best_checkpoint(run: Path) -> Path | None:
    """Returns the checkpoint folder that the link ``best`` in the folder of a run points to.

    None if there is no such link, or it does not point to a checkpoint of the run.
    """
    link = run / BEST
    target = run / link.readlink().name if link.is_symlink() else None
    return target if target in checkpoints(run) else None


def checkpoint_file(path: Path) -> Path:
    """Returns the path of the ``.safetensors`` file of a local checkpoint. The file is not read.

    Args:
        path: a checkpoint file, a folder with ``longalign.safetensors``, or a run's folder (its newest checkpoint).

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the file is an exported LoRA for diffusers, ``pytorch_lora_weights.safetensors``.
    """
    if path.is_file() or (path.suffix == ".safetensors" and not path.is_dir()):
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint {path}; expected a .safetensors file or a folder")
        if path.name == DIFFUSERS_LORA:
            raise ValueError(
                f"{path} is an exported LoRA for diffusers, without config and adapter; expected "
                f"{path.parent}, or {path.with_name(CHECKPOINT)}"
            )
        return path
    if (path / CHECKPOINT).is_file():
        return path / CHECKPOINT
    complete = [folder for folder in checkpoints(path) if (folder / CHECKPOINT).is_file()]
    if not complete:
        raise FileNotFoundError(f"no checkpoint in {path}; expected {CHECKPOINT} or checkpoint-<step>/{CHECKPOINT}")
    return complete[-1] / CHECKPOINT


def local_checkpoint(checkpoint: str) -> Path | None:
    """Returns the file of a local checkpoint, or None if ``checkpoint`` can only be a Hub repository ``owner/name``.

    Args:
        checkpoint: a path, as for `checkpoint_file`, or ``owner/name``. A local folder ``owner`` takes precedence.

    Raises:
        FileNotFoundError: if there is no local checkpoint, or ``checkpoint`` is a base model in diffusers layout.
        ValueError: if the file is an exported LoRA for diffusers.
    """
    if hub.is_base_model(checkpoint):
        raise FileNotFoundError(hub.BASE_MODEL.format(f"'{checkpoint}'"))
    path = Path(checkpoint)
    return checkpoint_file(path) if not HUB_ID.fullmatch(checkpoint) or Path(path.parts[0]).exists() else None


def find_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """Returns the file of a checkpoint, downloaded from the Hub if needed.

    Args:
        checkpoint: a path, as for `checkpoint_file`, or ``owner/name`` on the Hub. A local folder ``owner`` takes
            precedence.
        revision: branch, tag or commit on the Hub; the main branch if None. Ignored for a local checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint, or the download fails.
        ValueError: if the file is an exported LoRA for diffusers.
    """
    if path := local_checkpoint(checkpoint):
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint, CHECKPOINT, revision=revision))
    except Exception as error:
        reason = hub.download_problem(error, CHECKPOINT)
        raise FileNotFoundError(
            f"no local checkpoint '{checkpoint}', and it cannot be loaded from the Hub: {reason}; check the path or id"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file, empty if it has none, without reading tensors.

    The file starts with the length of the header in bytes (8 bytes, little-endian) and the header. The header is JSON,
    with the metadata under ``__metadata__``.

    Raises:
        ConfigError: if the header is invalid or truncated, or a value of the metadata is not a string.
        FileNotFoundError: if the file does not exist.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
    except (struct.error, ValueError, RecursionError) as error:
        raise ConfigError(
            [("", f"{path} is not a safetensors file, or is truncated: {error}; download or copy it again")]
        ) from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else header
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConfigError(
            [
                (
                    "",
                    f"{path} is damaged: expected strings as metadata, got {shorten(metadata)}; download or copy it "
                    "again",
                )
            ]
        )
    return metadata
