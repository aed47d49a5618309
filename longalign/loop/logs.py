"""Writes the metrics of a run to the progress bar and ``log.jsonl``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longalign.files.atomic import atomic_write

log = logging.getLogger("longalign")

LOG = "log.jsonl"


class MetricMeans:
    """Means of a run's metrics over several steps. The sums stay on the device until `get`.

    Attributes:
        sums: sum of each metric, a tensor ``()``.
        counts: for each metric, the number of steps that have it.
        skipped: number of steps that fp16's gradient scaler skipped.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.skipped = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the metrics of one step: name -> tensor ``()``."""
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def get(self, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
        """Returns the mean of each metric over the steps that have it; empty if nothing was added.

        Args:
            reduce: averages each of the k means in a tensor ``(k,)`` over all processes, and returns a tensor ``(k,)``.
        """
        if not self.sums:
            return {}
        means = torch.stack([total / self.counts[key] for key, total in self.sums.items()])
        return dict(zip(self.sums, reduce(means).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """Returns sums and counts for `load`, so that a resumed run logs the same means."""
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": self.counts, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any], device: Any) -> None:
        """Restores the result of `state`, with the sums on ``device``."""
        self.sums = {key: value.to(device) for key, value in state["sums"].items()}
        self.counts, self.skipped = dict(state["counts"]), state["skipped"]


class Log:
    """Writes a run's metrics to ``log.jsonl`` and shows a progress bar.

    Args:
        output: the run's folder. Lines in its ``log.jsonl`` for steps after ``step`` are removed; they are left over
            from before an interruption.
        step: number of completed optimizer steps; for 0, all lines are removed.
        steps: number of optimizer steps of the whole run.
        enabled: whether this process writes lines and shows the bar; if False, all methods do nothing.
    """

    def __init__(self, output: Path, step: int, steps: int, enabled: bool):
        self.path, self.enabled = output / LOG, enabled
        self.start = time.perf_counter()
        if enabled:
            self._truncate_after(step or -1)  # at the start of a run, no line is valid
        self.bar = tqdm(initial=step, total=steps, desc="training", disable=not enabled, dynamic_ncols=True)

    def _truncate_after(self, step: int) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        lines = []
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            line_step = _step_of_line(line)
            if line_step is None:
                log.warning("%s, line %d is damaged and is removed", self.path, number)
            elif line_step <= step:
                lines.append(line)
        if (truncated := b"".join(lines)) != content:
            with atomic_write(self.path) as unfinished:
                unfinished.write_bytes(truncated)

    def advance(self) -> None:
        """Advances the progress bar by one optimizer step."""
        self.bar.update()

    @property
    def seconds(self) -> float:
        """Seconds since this log was created, i.e. since the run was started or last resumed."""
        return time.perf_counter() - self.start

    def append(self, step: int, values: dict[str, float]) -> None:
        """Appends a line ``{"step": step, "seconds": seconds, **values}`` to ``log.jsonl``.

        If the file cannot be written, e.g. on a full disk, the line is shown in a warning instead.
        """
        if not self.enabled:
            return
        line: dict[str, Any] = {"step": step, "seconds": round(self.seconds, 3), **values}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # e.g. a full disk, which may have room again for the next checkpoint
            log.warning("cannot write to %s (%s); this line is lost: %s", self.path, error, json.dumps(line))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line as `append` does, and shows its values and the peak GPU memory in GiB on the progress bar.

        The gradient norm and values whose names end in ``_loss`` are not shown.
        """
        self.append(step, values)
        if not self.enabled:
            return
        shown = {k: f"{v:.4g}" for k, v in values.items() if k != "grad_norm" and not k.endswith("_loss")}
        if torch.cuda.is_available():
            shown["GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Closes the progress bar."""
        self.bar.close()


def _step_of_line(line: bytes) -> int | None:
    """Returns the step of a log line, or None if the line is damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError):
        return None
