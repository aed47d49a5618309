"""Removes credentials and local paths from configs in shared files. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from longalign.config.run import RunConfig, to_dict
from longalign.errors import redact_url

#: config keys with local paths of training; these paths are shortened to their last part in an export
PRIVATE_KEYS = ("output", "init_from", "data", "cache", "monitor")

_USER_FOLDER = re.compile(r"((?:/home|/Users|\\Users)[/\\])[^/\\\s'\"]+")
_TOKEN = re.compile(r"\b(?:hf|sk|ghp|github_pat)[_-]\w{8,}")


def redacted(value: Any, redact: Callable[[str], str] = redact_url) -> Any:
    """Applies a function to every string value of a config and returns the changed copy.

    Args:
        value: the config as dicts, lists and plain values.
        redact: the function; by default removes credentials from URLs.
    """
    if isinstance(value, dict):
        return {key: redacted(child, redact) for key, child in value.items()}
    if isinstance(value, list):
        return [redacted(child, redact) for child in value]
    return redact(value) if isinstance(value, str) else value


def redact_path(text: str) -> str:
    """Shortens an absolute path, or a path that starts with ``~``, to its last part.

    A text that is no such path is returned without the credentials in its URLs.
    """
    if "\n" not in text and "://" not in text:
        for path_class in (PurePosixPath, PureWindowsPath):
            path = path_class(text)
            if path.is_absolute() or text.startswith("~"):
                return path.name or "data"
    return redact_url(text)


def redact_report(text: str) -> str:
    """Returns a text for a bug report, without credentials and user names.

    The path of the home folder is replaced by ``~``; other user names in paths, and access tokens, by ``***``.
    """
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    text = _USER_FOLDER.sub(r"\1***", text)
    return _TOKEN.sub("***", redact_url(text))


def public_config(config: RunConfig) -> Any:
    """Returns a config as a dict without credentials; local paths are shortened to their last part."""
    return redacted(to_dict(config), redact_path)


def exported_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config, as a dict, in the form in which it is exported: without credentials in URLs.

    In the keys `PRIVATE_KEYS`, such as ``data`` and ``output``, local paths are shortened to their last part.
    """
    return {key: redacted(value, redact_path if key in PRIVATE_KEYS else redact_url) for key, value in tree.items()}


def exported_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config, as a dict, without the keys `PRIVATE_KEYS`, whose values an export changes."""
    return {key: value for key, value in config.items() if key not in PRIVATE_KEYS}
