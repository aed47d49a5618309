"""Runs checks and collects their results as rows; an exception in a check becomes a row too."""

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
    """One result of a check, shown as a row of a table.

    Attributes:
        check: name of the check.
        status: ``"ok"``, ``"failed"``, ``"missing"`` if a checkpoint is not available, or ``"info"`` for a value
            that is shown but not checked.
        result: what was measured, as text.
        expected: what a passing result looks like, as text; may be empty.
        seconds: duration of the whole step, in the first row of the step (`run_step`); 0 in all later rows.
    """

    check: str
    status: Status
    result: str
    expected: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the row as a mapping of attribute names to JSON values."""
        return asdict(self)


def compare(check: str, ok: bool, result: str, expected: str) -> Row:
    """Returns the `Row` of a check, with status ``"ok"`` or ``"failed"``.

    Args:
        check: name of the check.
        ok: whether the check passed.
        result: what was measured, as text.
        expected: what a passing result looks like, as text.
    """
    return Row(check, "ok" if ok else "failed", result, expected)


class Unavailable(Exception):
    """Raised by a check whose checkpoint is not on this machine and cannot be downloaded."""


def run_step(name: str, step: Callable[[], Iterable[Row]]) -> list[Row]:
    """Calls a function that yields rows, and returns the rows. The first row gets the duration of the call in seconds.

    An exception ends the call and becomes the last row, with status ``"missing"`` for `Unavailable` and otherwise
    ``"failed"``.

    Args:
        name: name of the step, which is logged, and is the name ``check`` in the row of an exception.
        step: the function.
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
    """Whether any row has the status ``"failed"``. A missing checkpoint is not a failure."""
    return any(row.status == "failed" for row in rows)
