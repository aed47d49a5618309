"""Checkpoints in transformers layout: optional files, image statistics, and checks of what was loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longalign.functional.images import CLIP_MEAN, CLIP_STD


def find_optional_file(
    checkpoint: str, name: str, revision: str | None = None, subfolder: str | None = None
) -> Path | None:
    """Returns the path of a file of a checkpoint, downloaded if needed; None if the checkpoint has no such file."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        checkpoint,
        name,
        revision=revision,
        subfolder=subfolder or "",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(path) if isinstance(path, str) else None


def has_tokenizer(checkpoint: str, revision: str | None = None, subfolder: str | None = None) -> bool:
    """Whether a checkpoint contains a tokenizer."""
    files = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
    return any(find_optional_file(checkpoint, name, revision, subfolder) for name in files)


def image_processor_config(
    checkpoint: str, revision: str | None = None, subfolder: str | None = None
) -> Mapping[str, Any]:
    """Returns the settings of a checkpoint's image processor; empty if it has none.

    Reads ``preprocessor_config.json`` or ``processor_config.json``.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = find_optional_file(checkpoint, name, revision, subfolder)
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path else {}
        values = values.get("image_processor", values)
        if "image_mean" in values:
            return values
    return {}


def image_statistics(
    checkpoint: str,
    revision: str | None = None,
    subfolder: str | None = None,
    default: tuple[tuple[float, ...], tuple[float, ...]] = (CLIP_MEAN, CLIP_STD),
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns a checkpoint's image mean and standard deviation, or ``default`` if not available."""
    values = image_processor_config(checkpoint, revision, subfolder)
    if "image_mean" in values and "image_std" in values:
        return tuple(values["image_mean"]), tuple(values["image_std"])
    return default


def check_tokenizer(num_tokens: int, num_embeddings: int, processor: str, checkpoint: str) -> None:
    """Raises ValueError if a tokenizer has more tokens than the checkpoint's text tower has embeddings."""
    if num_tokens > num_embeddings:
        raise ValueError(
            f"the tokenizer of '{processor}' has {num_tokens} tokens, but the text tower of '{checkpoint}' has only "
            f"{num_embeddings} embeddings; set `processor` to a checkpoint with the tokenizer used in training"
        )


def projected_features(output: Any) -> Tensor:
    """Returns the projected features from the output of ``get_*_features`` of transformers 4 (tensor) or 5 (object)."""
    return output if isinstance(output, Tensor) else output.pooler_output
