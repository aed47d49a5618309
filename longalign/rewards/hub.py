"""Files of a checkpoint that is a hub id or a local folder, and the image settings they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longalign.images import CLIP_MEAN, CLIP_STD


def find_file(checkpoint: str, name: str, revision: str | None = None, subfolder: str | None = None) -> Path | None:
    """A file of a checkpoint on this machine, downloaded if need be; None where the checkpoint does not hold it."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        checkpoint,
        name,
        revision=revision,
        subfolder=subfolder or "",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if isinstance(found, str) else None


def holds_tokenizer(checkpoint: str, revision: str | None = None, subfolder: str | None = None) -> bool:
    """Whether a checkpoint comes with a tokenizer of its own."""
    files = ("tokenizer.json", "vocab.json", "spiece.model")
    return any(find_file(checkpoint, name, revision, subfolder) for name in files)


def image_statistics(
    checkpoint: str,
    revision: str | None = None,
    subfolder: str | None = None,
    default: tuple[tuple[float, ...], tuple[float, ...]] = (CLIP_MEAN, CLIP_STD),
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation from a checkpoint's ``preprocessor_config.json`` (or ``processor_config.json``)."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = find_file(checkpoint, name, revision, subfolder)
        if path is None:
            continue
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values = values.get("image_processor", values)
        if "image_mean" in values and "image_std" in values:
            return tuple(values["image_mean"]), tuple(values["image_std"])
    return default
