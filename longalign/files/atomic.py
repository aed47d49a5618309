"""Writes files atomically: a reader sees the old file or the complete new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path, at which the caller writes the file.

    The temporary path is in the folder of ``path``. On exit, the file is synced to disk and renamed to ``path``. After
    an error, the temporary file is removed, and ``path`` is not changed.

    Raises:
        OSError: if the file cannot be written. A `SafetensorError` or `RuntimeError` in the context becomes an OSError,
            because torch and safetensors report a full disk in this way.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, (SafetensorError, RuntimeError)):  # libraries report a full disk this way
            raise OSError(f"cannot write {path}: {str(error).strip()}; check the free disk space") from error
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Calls fsync on a file, or on a folder to make its entries durable. Does nothing if ``path`` cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
