"""Runs checks one after the other; a check that fails does not stop the others."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

log = logging.getLogger("longalign")

Status = Literal["ok", "failed", "missing", "info"]


@dataclass(frozen=True)
class Row:
    """One result of a check.

    Attributes:
        check: what was checked.
        status: ``"ok"``, ``"failed"``, ``"missing"`` if a checkpoint is not available, or ``"info"`` for a value
            that is not compared.
        result: what was found.
        expected: what was expected, or an empty text.
        seconds: duration of the step that the row belongs to.
    """

    check: str
    status: Status
    result: str
    expected: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the row as JSON values."""
        return asdict(self)


def compare(check: str, ok: bool, result: str, expected: str) -> Row:
    """Returns the row of a check, with status ``ok`` or ``failed``.

    Args:
        check: name of the check.
        ok: whether the check passed.
        result: what was measured, as text.
        expected: what a passing result looks like, as text.
    """
    return Row(check, "ok" if ok else "failed", result, expected)


class Unavailable(Exception):
    """Raised by a step whose checkpoint is not on this machine and cannot be downloaded."""


def run_step(name: str, step: Callable[[], Iterable[Row]]) -> list[Row]:
    """Runs one step and returns its rows; an exception becomes a row.

    The first row has the duration of the whole step.
    """
    log.info("%s ...", name)
    start, rows = time.perf_counter(), []
    try:
        rows.extend(step())
    except Unavailable as error:
        rows.append(Row(name, "missing", str(error)))
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        message = str(error).strip().partition("\n")[0]
        rows.append(Row(name, "failed", f"{type(error).__name__}: {message}"))
    seconds = round(time.perf_counter() - start, 2)
    return [Row(**{**row.as_dict(), "seconds": seconds if i == 0 else 0.0}) for i, row in enumerate(rows)]


def failed(rows: Iterable[Row]) -> bool:
    """Whether a row has failed. A missing checkpoint is not a failure."""
    return any(row.status == "failed" for row in rows)
