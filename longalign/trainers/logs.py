"""Where a run's numbers go: the progress bar, ``log.jsonl``, and the trackers that are asked for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longalign.weights import writing

log = logging.getLogger("longalign")

LOG = "log.jsonl"


class Means:
    """Means of what is logged, over the steps since the last line; they stay on the device until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.skipped = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one step's scalars."""
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def get(self, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
        """The means, over all processes by ``reduce``."""
        if not self.sums:
            return {}
        means = torch.stack([total / self.counts[key] for key, total in self.sums.items()])
        return dict(zip(self.sums, reduce(means).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """What `load` takes, so that a resumed run logs the same means."""
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": self.counts, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any], device: Any) -> None:
        """Sets what `state` gave."""
        self.sums = {key: value.to(device) for key, value in state["sums"].items()}
        self.counts, self.skipped = dict(state["counts"]), state["skipped"]


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
        if writes:
            self._forget_after(step)
        self.bar = tqdm(initial=step, total=steps, desc="training", disable=not writes, dynamic_ncols=True)

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = []
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            at = _step(line)
            if at is None:
                log.warning("%s, line %d is damaged and is omitted", self.path, number)
            elif at <= step:
                kept.append(line)
        if (new := b"".join(kept)) != content:
            with writing(self.path) as unfinished:
                unfinished.write_bytes(new)

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a line ``{"step", "seconds", ...values}`` and shows loss, rewards and memory on the bar."""
        if not self.writes:
            return
        line: dict[str, Any] = {"step": step, "seconds": round(time.perf_counter() - self.start, 3), **values}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # such as a full disk, on which there may be room again at the next checkpoint
            log.warning("cannot write %s (%s); this line of it is lost: %s", self.path, error, json.dumps(line))
        shown = {k: f"{v:.4g}" for k, v in values.items() if k != "grad_norm" and not k.endswith("_loss")}
        if torch.cuda.is_available():
            shown["GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def _step(line: bytes) -> int | None:
    """The step of a whole line of the log; None of a damaged one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError):
        return None


def flat(path: str, value: Any) -> Iterator[tuple[str, int | float | str | bool]]:
    """Nested values as dotted paths and plain values, which is what trackers keep of a config."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from flat(f"{path}.{key}" if path else key, child)
    else:
        yield path, value if isinstance(value, (int, float, str, bool)) else str(value)
