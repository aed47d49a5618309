"""Handles Ctrl-C and termination signals: a run finishes its current step, then stops."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("longalign")

#: signals that stop a run: SIGINT by Ctrl-C, SIGTERM by clusters before they kill, SIGHUP when a terminal is closed
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: time in seconds in which a second Ctrl-C is ignored, since a launcher may forward the first one
FORWARD_SECONDS = 0.5
#: time in seconds that a data-loading worker continues after SIGTERM, so that the training step can finish
GRACE_SECONDS = 60


class Interruption:
    """Records the first signal that asks the run to stop. Calling an instance returns whether there was one.

    Attributes:
        number: number of the signal; None if there was none.
        time: time of the signal in seconds, from ``time.monotonic``.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.time = 0.0

    def __call__(self) -> bool:
        return self.number is not None

    def handle(self, number: int, frame: Any) -> None:
        """Signal handler: records the first signal.

        A later Ctrl-C raises KeyboardInterrupt, unless it comes within `FORWARD_SECONDS`. Other later signals are
        ignored.
        """
        if self.number is None:
            self.number, self.time = number, time.monotonic()
            advice = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            log.warning("%s: finishing this step and writing a checkpoint%s", signal.Signals(number).name, advice)
        elif number == signal.SIGINT and time.monotonic() - self.time > FORWARD_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[Interruption]:
    """Context manager: records signals in `SIGNALS` in the yielded `Interruption`, and restores the handlers on exit.

    Signals that the process ignores, as under ``nohup``, stay ignored. Outside the main thread, none is recorded.
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
    """Makes a data-loading worker ignore `SIGNALS`, so that the training process can finish its step.

    SIGTERM ends the worker after `GRACE_SECONDS`. This is the ``worker_init_fn`` of data loaders, which pass the index
    of the worker.
    """
    for number in SIGNALS:
        if number == signal.SIGTERM and hasattr(signal, "alarm"):
            signal.signal(number, lambda *_: signal.alarm(GRACE_SECONDS))  # ends a worker that hangs
        else:
            signal.signal(number, signal.SIG_IGN)
