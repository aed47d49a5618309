"""Handles Ctrl-C and termination signals: the run finishes the current step, then stops."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("longalign")

#: Ctrl-C; sent by clusters and spot machines before they kill; sent when a terminal is closed
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: a second Ctrl-C within so many seconds is the first one, forwarded by a launcher
FORWARD_SECONDS = 0.5
#: seconds a data-loading worker survives SIGTERM, so that the step can finish
GRACE_SECONDS = 60


class Interruption:
    """Records whether a signal requested the run to stop, and which signal.

    Attributes:
        number: number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.time = 0.0

    def __call__(self) -> bool:
        return self.number is not None

    def handle(self, number: int, frame: Any) -> None:
        """Handles a signal. A second Ctrl-C raises KeyboardInterrupt; other repeated signals are ignored."""
        if self.number is None:
            self.number, self.time = number, time.monotonic()
            advice = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            log.warning("%s: finishing this step and writing a checkpoint%s", signal.Signals(number).name, advice)
        elif number == signal.SIGINT and time.monotonic() - self.time > FORWARD_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[Interruption]:
    """Context manager: records `SIGNALS` in the yielded `Interruption` and restores the handlers on exit.

    Signals that the process ignores, as under ``nohup``, stay ignored.
    """
    interruption = Interruption()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, interruption.handle)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_signals(worker: int = 0) -> None:
    """Ignores signals to the process group, so that the step can finish; the ``worker_init_fn`` of data loaders."""
    for number in SIGNALS:
        if number == signal.SIGTERM and hasattr(signal, "alarm"):
            signal.signal(number, lambda *_: signal.alarm(GRACE_SECONDS))  # ends a worker that hangs
        else:
            signal.signal(number, signal.SIG_IGN)
