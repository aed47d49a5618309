"""Where a run's numbers go: the progress bar, ``log.jsonl``, and the trackers that are asked for."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("longalign")

LOG = "log.jsonl"


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises ValueError for a tracker whose package is not installed."""
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(
                f"the tracker '{tracker}' needs a package that is not installed; "
                f"install it with: pip install 'longalign[{tracker}]', or take it out of loop.trackers"
            )


def check_unused(output: Path) -> None:
    """Raises ValueError if there is a run in the folder already, so that two are never mixed."""
    if (output / LOG).exists():
        raise ValueError(f"there is a run in {output} already; resume it, choose another output, or remove the folder")


class Log:
    """One writer of a run's numbers.

    Args:
        output: the run's folder. Lines of ``log.jsonl`` after ``step``, left by an interruption, are removed.
        step: steps done.
        steps: steps in all.
        writes: whether this process writes.
    """

    def __init__(self, output: Path, step: int, steps: int, writes: bool):
        self.path, self.writes = output / LOG, writes
        self.start = time.perf_counter()
        self.bar = tqdm(initial=step, total=steps, desc="training", disable=not writes, dynamic_ncols=True)
        if writes:
            self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]
        self.path.write_text("".join(x for x in complete if json.loads(x)["step"] <= step), encoding="utf-8")

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a line ``{"step", "seconds", ...values}`` and shows loss and rewards on the bar."""
        if not self.writes:
            return
        line: dict[str, Any] = {"step": step, "seconds": round(time.perf_counter() - self.start, 3), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        hidden = ("lr", "grad_norm")
        shown = {k: f"{v:.4g}" for k, v in values.items() if k not in hidden and not k.endswith("_loss")}
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def flat(path: str, value: Any) -> Iterator[tuple[str, int | float | str | bool]]:
    """Nested values as dotted paths and plain values, which is what trackers keep of a config."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from flat(f"{path}.{key}" if path else key, child)
    else:
        yield path, value if isinstance(value, (int, float, str, bool)) else str(value)
