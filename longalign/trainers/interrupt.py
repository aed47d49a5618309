"""Signals as requests that are granted at the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("longalign")

#: Ctrl-C; what clusters and spot machines send before they kill; a terminal that was closed
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: seconds within which a second Ctrl-C is the first one, sent on by a launcher
SAME = 0.5
#: seconds that a process which loads data lives on after it was told to end, while the step is finished
GRACE = 60


class Interruption:
    """Whether a run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.time = 0.0

    def __call__(self) -> bool:
        return self.number is not None

    def ask(self, number: int, frame: Any) -> None:
        """Handles a signal. A second Ctrl-C interrupts at once; others come twice where a launcher sends them on."""
        if self.number is None:
            self.number, self.time = number, time.monotonic()
            advice = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            log.warning("%s: finishing this step and writing a checkpoint%s", signal.Signals(number).name, advice)
        elif number == signal.SIGINT and time.monotonic() - self.time > SAME:
            raise KeyboardInterrupt


@contextmanager
def until_interrupted() -> Iterator[Interruption]:
    """Gives what says whether the process was asked to stop. Signals it ignores, as under ``nohup``, stay ignored."""
    asked = Interruption()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, asked.ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(worker: int = 0) -> None:
    """For a process that loads data: signals to the whole group must not take its batches from the step in progress."""
    for number in SIGNALS:
        if number == signal.SIGTERM and hasattr(signal, "alarm"):
            signal.signal(number, lambda *_: signal.alarm(GRACE))  # then it is ended, should it hang
        else:
            signal.signal(number, signal.SIG_IGN)
