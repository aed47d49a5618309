"""Reports means of a run's metrics in ``log.jsonl``, on the progress bar and in trackers."""

from __future__ import annotations

import math
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from longalign.config.run import RunConfig
from longalign.loop.logs import Log, MetricMeans
from longalign.loop.optimization import NonFinite
from longalign.loop.trackers import Trackers


class Reporter:
    """Collects the metrics of steps, and writes their means.

    Args:
        accelerator: accelerate's ``Accelerator``; means are taken over all processes.
        config: the run.
        step: number of completed steps.
        means: means since the last log line, restored if the run is resumed.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, step: int, means: MetricMeans):
        self.accelerator, self.means = accelerator, means
        self.log = Log(Path(config.output), step, config.loop.steps, accelerator.is_main_process)
        self.trackers = Trackers(accelerator, config)

    def add(self, metrics: dict[str, Tensor] | None) -> None:
        """Adds the metrics of one step, or counts it as skipped if None, and advances the progress bar."""
        if metrics is None:
            self.means.skipped += 1
        else:
            self.means.add(metrics)
        self.log.advance()

    def current(self) -> dict[str, float]:
        """Returns the means since the last log line over all processes. Raises NonFinite if a loss is not finite."""
        metrics = self.means.get(lambda means: self.accelerator.reduce(means.to(self.accelerator.device), "mean"))
        losses = {k: v for k, v in metrics.items() if k.endswith("_loss")}
        if not all(math.isfinite(v) for v in losses.values()):
            raise NonFinite(f"the loss is not finite ({losses})")
        return {"loss": sum(losses.values()), **metrics} if losses else metrics

    def write(self, step: int, lr: float, num_truncated: int) -> None:
        """Writes a line of `current` metrics, and resets the means.

        Args:
            step: number of completed steps.
            lr: learning rate.
            num_truncated: number of truncated prompts so far.
        """
        metrics = {**self.current(), "lr": lr}
        if self.means.skipped:
            metrics["skipped_steps"] = self.means.skipped
        if num_truncated:
            metrics["truncated_prompts"] = num_truncated
        self.means = MetricMeans()
        self.log.write(step, metrics)
        self.trackers.log_metrics(metrics, step)

    def append(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of given values instead of those of `current`."""
        self.log.append(step, values)
        self.trackers.log_metrics(values, step)
