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
    """Collects the metrics of optimizer steps, and writes their means to the log, the progress bar and trackers.

    Args:
        accelerator: accelerate's ``Accelerator``; means are taken over all processes.
        config: config of the run: output folder, number of steps and trackers.
        step: number of completed optimizer steps.
        means: metrics since the last log line: those of the checkpoint if the run is resumed, otherwise empty.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, step: int, means: MetricMeans):
        self.accelerator, self.means = accelerator, means
        self.log = Log(Path(config.output), step, config.loop.steps, accelerator.is_main_process)
        self.trackers = Trackers(accelerator, config)

    def add(self, metrics: dict[str, Tensor] | None) -> None:
        """Adds the metrics of one optimizer step, and advances the progress bar.

        Args:
            metrics: name -> tensor ``()``; None if fp16's gradient scaler skipped the step, which is counted.
        """
        if metrics is None:
            self.means.skipped += 1
        else:
            self.means.add(metrics)
        self.log.advance()

    def current(self) -> dict[str, float]:
        """Returns the means of the metrics since the last log line, over all processes.

        They include ``loss``, the sum of the means whose names end in ``_loss``. All processes must call this method.

        Raises:
            NonFinite: if the mean of a loss is not finite.
        """
        metrics = self.means.get(lambda means: self.accelerator.reduce(means.to(self.accelerator.device), "mean"))
        losses = {k: v for k, v in metrics.items() if k.endswith("_loss")}
        if not all(math.isfinite(v) for v in losses.values()):
            raise NonFinite(f"expected finite losses, got {losses}")
        return {"loss": sum(losses.values()), **metrics} if losses else metrics

    def write(self, step: int, lr: float, num_truncated: int) -> None:
        """Writes the `current` metrics to the log, the progress bar and trackers, and resets them.

        Args:
            step: number of completed optimizer steps.
            lr: learning rate of the last step.
            num_truncated: number of truncated prompts so far in this process; logged if it is not 0.
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
        """Writes ``values``, by name, to the log and to trackers. The metrics of `current` are unchanged."""
        self.log.append(step, values)
        self.trackers.log_metrics(values, step)
