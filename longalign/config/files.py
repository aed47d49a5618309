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
    """Returns the path of a component folder in a checkpoint whose components are all inside ``subfolder``."""
    return f"{subfolder}/{folder}" if subfolder else folder


def check_single_file(checkpoint: str, layout: str | None, **selection: str | None) -> None:
    """Checks that config keys match the type of a checkpoint: a ``.safetensors`` file, or a folder or repository.

    Args:
        checkpoint: file, folder or repository.
        layout: layout of a single file.
        **selection: keys that select files of a folder or repository.

    Raises:
        ValueError: if the checkpoint is a pickle, or a key does not apply to this type of checkpoint.
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
    """Raises ValueError if the path of a folder, or one of its parents, is a file."""
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"{path} is a file; expected a folder")
            return


def check_unexported(folder: Path) -> None:
    """Raises ValueError if a folder contains an exported checkpoint, or is a file."""
    check_folder(folder)
    for name in (CHECKPOINT, CARD):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} exists; choose a different folder, or set overwrite (--overwrite)")


def checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first."""
    return sorted((p for p in run.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the step of a checkpoint folder, from its name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def best_checkpoint(run: Path) -> Path | None:
    """Returns the checkpoint that the link `BEST` of a run names, or None."""
    link = run / BEST
    target = run / link.readlink().name if link.is_symlink() else None
    return target if target in checkpoints(run) else None


def checkpoint_file(path: Path) -> Path:
    """Returns the ``longalign.safetensors`` of a checkpoint file, a checkpoint folder, or a run's newest checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the file is an exported LoRA for diffusers.
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
    """Returns a local checkpoint as `checkpoint_file` does, or None if ``checkpoint`` is a Hub repository.

    Raises:
        FileNotFoundError: if there is no checkpoint, or it is a base model.
    """
    if hub.is_base_model(checkpoint):
        raise FileNotFoundError(hub.BASE_MODEL.format(f"'{checkpoint}'"))
    path = Path(checkpoint)
    return checkpoint_file(path) if not HUB_ID.fullmatch(checkpoint) or Path(path.parts[0]).exists() else None


def find_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """Returns a local checkpoint as `checkpoint_file` does, or downloads it from the Hub repository ``owner/name``.

    The Hub is only used if there is no local folder ``owner``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
    """
    if path := local_checkpoint(checkpoint):
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint, CHECKPOINT, revision=revision))
    except Exception as error:
        reason = hub.download_problem(error, CHECKPOINT)
        raise FileNotFoundError(
            f"no local checkpoint '{checkpoint}', and it cannot be loaded from the Hub: {reason}"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file without its tensors.

    The file starts with the header length in 8 bytes and a JSON header with ``__metadata__``.

    Raises:
        ConfigError: if the header is invalid or truncated, or a value is not a string.
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
