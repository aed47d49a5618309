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
    """Returns the path of a file of a checkpoint, downloaded if needed; None if the file is not available.

    Args:
        checkpoint: Hub id or local folder.
        name: name of the file.
        revision: branch, tag or commit of the Hub repository; None: its main branch.
        subfolder: subfolder of the checkpoint with the file; None: the checkpoint itself.

    Raises:
        OSError: if ``checkpoint`` is neither a folder nor a Hub repository.
    """
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
    """Returns whether a checkpoint contains a tokenizer. The arguments are those of `find_optional_file`."""
    files = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
    return any(find_optional_file(checkpoint, name, revision, subfolder) for name in files)


def image_processor_config(
    checkpoint: str, revision: str | None = None, subfolder: str | None = None
) -> Mapping[str, Any]:
    """Returns the settings of a checkpoint's image processor, such as ``image_mean``; empty if it has none.

    Reads ``preprocessor_config.json`` or ``processor_config.json`` of transformers.

    Args:
        checkpoint: Hub id or local folder.
        revision: branch, tag or commit of the Hub repository; None: its main branch.
        subfolder: subfolder of the checkpoint with the file; None: the checkpoint itself.
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
    """Returns the mean and standard deviation by which a checkpoint normalizes images in [0, 1], per RGB channel.

    Args:
        checkpoint: Hub id or local folder.
        revision: branch, tag or commit of the Hub repository; None: its main branch.
        subfolder: subfolder with the config of the image processor; None: the checkpoint itself.
        default: mean and standard deviation to return if the checkpoint contains none.
    """
    values = image_processor_config(checkpoint, revision, subfolder)
    if "image_mean" in values and "image_std" in values:
        return tuple(values["image_mean"]), tuple(values["image_std"])
    return default


def check_tokenizer(num_tokens: int, num_embeddings: int, processor: str, checkpoint: str) -> None:
    """Raises ValueError if a tokenizer has more tokens than the text encoder has token embeddings.

    Args:
        num_tokens: number of tokens of the tokenizer.
        num_embeddings: number of token embeddings of the text encoder.
        processor: checkpoint of the tokenizer, for the message.
        checkpoint: checkpoint of the text encoder, for the message.
    """
    if num_tokens > num_embeddings:
        raise ValueError(
            f"the tokenizer of '{processor}' has {num_tokens} tokens, but the text tower of '{checkpoint}' has only "
            f"{num_embeddings} embeddings; set `processor` to a checkpoint with the tokenizer used in training"
        )


def projected_features(output: Any) -> Tensor:
    """Returns the embeddings ``(b, d)`` in the output of ``get_image_features`` or ``get_text_features``.

    The output is a tensor in transformers 4, and an object in transformers 5.
    """
    return output if isinstance(output, Tensor) else output.pooler_output
