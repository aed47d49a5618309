"""Folders that one process writes to at a time."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where two processes in one folder are not noticed
    fcntl = None

log = logging.getLogger("longalign")

LOCK = ".lock"


class Lock:
    """Keeps other processes out of a folder until it is released or this process ends, however it ends.

    Args:
        output: the folder; made if it is missing.

    Raises:
        ValueError: naming the process that is writing to it.
    """

    def __init__(self, output: Path):
        output.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = (output / LOCK).open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise ValueError(
                f"{owner} is writing to {output}; wait until it ends, stop it, or choose another folder"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); see to it that no other process writes to it", output, error)
        with suppress(OSError):  # on a full disk nobody is named, and the lock holds all the same
            self.file.truncate(0)
            os.write(self.file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Lets others in. The file stays, for removing it would let two processes lock two files of its name."""
        self.file.close()
