"""Locks folders to which only one process may write."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: no locking
    fcntl = None

log = logging.getLogger("longalign")

LOCK = ".lock"


class Lock:
    """Exclusive lock of a folder, held until `release` or until this process ends or is killed.

    On a file system that does not support locks, there is a warning and no lock.

    Args:
        output: the folder; created if missing.

    Raises:
        ValueError: if a different process holds the lock; the message names this process and its machine.
    """

    def __init__(self, output: Path):
        output.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = (output / LOCK).open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            owner = self.file.read().strip() or "a different process"
            self.file.close()
            raise ValueError(
                f"{owner} is writing to {output}; wait until this process ends, stop it, or choose a different folder"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); make sure that no other process writes to it", output, error)
        with suppress(OSError):  # on a full disk the name is missing, but the lock holds
            self.file.truncate(0)
            os.write(self.file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Releases the lock. The lock file stays: if it were removed, two processes could lock different files."""
        self.file.close()
