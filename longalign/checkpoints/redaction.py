"""Removes credentials and local paths from configs in shared files. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from longalign.config.run import RunConfig, to_dict
from longalign.errors import redact_url

#: config keys with local paths of training; the paths are removed from an export
PRIVATE_KEYS = ("output", "init_from", "data", "cache", "validation")


def redacted(value: Any) -> Any:
    """Returns a dumped config without the credentials in its URLs."""
    if isinstance(value, dict):
        return {key: redacted(child) for key, child in value.items()}
    if isinstance(value, list):
        return [redacted(child) for child in value]
    return redact_url(value) if isinstance(value, str) else value


def redact_paths(value: Any) -> Any:
    """Redacts as `redacted`, and shortens absolute paths and paths in a home folder to their last part."""
    if isinstance(value, dict):
        return {key: redact_paths(v) for key, v in value.items()}
    if isinstance(value, list):
        return [redact_paths(v) for v in value]
    if isinstance(value, str) and "\n" not in value and "://" not in value:
        for path_class in (PurePosixPath, PureWindowsPath):
            path = path_class(value)
            if path.is_absolute() or value.startswith("~"):
                return path.name or "data"
    return redacted(value)


def public_config(config: RunConfig) -> Any:
    """Returns a config without credentials and local paths."""
    return redact_paths(to_dict(config))


def exported_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dumped config as it is exported: without local paths of training and without credentials."""
    return {key: redact_paths(value) if key in PRIVATE_KEYS else redacted(value) for key, value in tree.items()}


def exported_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a config that is identical in a checkpoint and in its export."""
    return {key: value for key, value in config.items() if key not in PRIVATE_KEYS}
