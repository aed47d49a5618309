"""Samples images of held-out prompts during training, measures them with metrics, and finds the best checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from torch import Tensor

from longalign import registry
from longalign.compose import Composition
from longalign.config.monitor import MonitorConfig
from longalign.errors import RunError
from longalign.evaluation.measure import Summary, summarize
from longalign.functional.rollout_gradient import RandomState
from longalign.image_folder import append_images, image_row, new_index, remove_listed
from longalign.inference.sampling import sample
from longalign.loop.logs import MetricMeans
from longalign.loop.optimization import Optimization
from longalign.loop.points import Point, best_checkpoint, divergences, is_over
from longalign.loop.reporter import Reporter
from longalign.metrics.base import Metric, as_metric
from longalign.runtime import Runtime
from longalign.sizes import parse_size

log = logging.getLogger("longalign")

#: maximum number of images of one measurement that are sent to trackers, e.g. TensorBoard
TRACKED_IMAGES = 16


def build_metrics(settings: MonitorConfig | None, runtime: Runtime) -> list[Metric]:
    """Builds the metrics of the section `monitor`, in eval mode; without the section, there are none.

    They can be used in one process alone, because they exchange nothing with other processes.
    """
    if settings is None:
        return []
    alone = Runtime(runtime.device, runtime.dtype)
    return [as_metric(registry.metrics.construct(config, alone)).eval() for config in settings.metrics]


class Monitor:
    """Measures a run while it trains: samples images of held-out prompts from fixed noise and applies metrics.

    A measurement's images and their list are written to ``<output>/monitor/<step>/`` in the format of ``longalign
    generate``. Its values are logged as ``monitor/<name>``. A run without the section `monitor` has no measurements.

    Args:
        composition: the run's config and its built parts.
        optimization: holds the trainable weights. Images are sampled with their moving average if the run has one.
        prompts: the held-out prompts; one image is sampled for each prompt and each seed in `monitor`.
        metrics: the metrics; only those of the first process are used.
        reporter: writes values to the log, and values and images to trackers.

    Attributes:
        points: all measurements so far, from first to last, the same in all processes.
        means: metrics of the training steps of this process since the last measurement.
        rows: prompt and seed of each image; see `longalign.image_folder.image_row`.
        seconds: time in seconds that this process has spent in measurements.
    """

    def __init__(
        self,
        composition: Composition,
        optimization: Optimization,
        prompts: Sequence[str],
        metrics: Sequence[Metric],
        reporter: Reporter,
    ):
        self.composition, self.optimization, self.metrics, self.reporter = composition, optimization, metrics, reporter
        self.settings, self.last_step = composition.config.monitor, composition.config.loop.steps
        self.seeds = () if self.settings is None else self.settings.seeds
        jobs = [(i, seed) for i in range(len(prompts)) for seed in self.seeds]
        self.rows = [image_row(i, prompts[i], seed) for i, seed in jobs]
        self.points: list[Point] = []
        self.means = MetricMeans()
        self.seconds = 0.0

    def is_due(self, step: int) -> bool:
        """Returns whether a measurement is due after ``step`` completed optimizer steps.

        It is due at the start, every ``monitor.every`` steps and at the last step, unless there already is one of this
        step.
        """
        if self.settings is None or any(point.step == step for point in self.points):
            return False
        return step % self.settings.every == 0 or step == self.last_step

    def run(self, step: int) -> Exception | None:
        """Generates and measures the held-out images, and appends the measurement to ``points`` in all processes.

        All processes must call this method. Only the first process measures. Only the first one generates, too, unless
        FSDP shards the weights: then all processes generate.

        Args:
            step: number of completed optimizer steps.

        Returns:
            The error, if one occurred, so that the caller can save a checkpoint before raising it; else None.
        """
        assert self.settings is not None
        accelerator = self.optimization.accelerator
        point, failure = None, None
        with self._timed():
            means = self.means.get(lambda means: accelerator.reduce(means.to(accelerator.device), "mean"))
            try:
                if accelerator.is_main_process or self.optimization.sharded:
                    point = self._measure(step, training_values(means))
            except Exception as error:  # another process must not wait for this one
                failure = error
            if accelerator.num_processes > 1:
                (state,) = broadcast_object_list([None if point is None else point.state()])
                point = None if state is None else Point(**state)
        if point is None:
            return failure or RunError("the monitor failed in the first process; see its message")
        self.means = MetricMeans()
        self.points.append(point)
        for old in self.points[: -1 - self.settings.window]:
            old.rows = {}
        if accelerator.is_main_process:
            self._report(point)
        return None

    def _measure(self, step: int, training: dict[str, float]) -> Point | None:
        """Samples the images, and writes and measures them in the first process; returns None in the others."""
        composition, settings = self.composition, self.settings
        assert settings is not None
        prompts, seeds = [row["prompt"] for row in self.rows], [row["seed"] for row in self.rows]
        height, width = (None, None) if settings.size is None else parse_size(settings.size)
        with RandomState.now(composition.backbone.device).replayed():
            with self.optimization.averaged():
                images = sample(
                    composition.backbone,
                    composition.encoder,
                    prompts,
                    seeds=seeds,
                    num_steps=settings.num_steps,
                    guidance=settings.guidance,
                    solver=settings.solver,
                    height=height,
                    width=width,
                    batch_size=settings.batch_size,
                )
            if not self.optimization.accelerator.is_main_process:
                return None
            self._write(images, step)
            found = summarize(images, prompts, self.metrics, seeds, settings.batch_size)
        point = Point(step, {}, {}, training)
        for name, summary in found.items():
            if math.isfinite(summary.mean):
                point.values[name], point.directions[name] = summary.mean, summary.shown.direction
                if summary.rows is not None:
                    point.rows[name] = by_prompt(summary.rows, len(self.seeds))
        self._check_names(found)
        return point

    def _write(self, images: Tensor, step: int) -> None:
        folder = Path(self.composition.config.output) / "monitor" / f"{step:06d}"
        index = new_index(folder, overwrite=True)  # of an interrupted run
        folder.mkdir(parents=True, exist_ok=True)
        remove_listed(index)
        append_images(folder, self.rows, images, {"step": str(step)})
        self.reporter.trackers.log_images(images[:TRACKED_IMAGES], step)

    def _check_names(self, found: Mapping[str, Summary]) -> None:
        assert self.settings is not None
        for path, name in self.settings.names().items():
            if name not in found:
                raise ValueError(
                    f"monitor.{path}: no value '{name}'; the monitor measures {', '.join(found)}; choose one"
                )
            if found[name].shown.direction is None:
                directed = [other for other, summary in found.items() if summary.shown.direction is not None]
                raise ValueError(
                    f"monitor.{path}: for '{name}', neither higher nor lower is better; choose one of "
                    f"{', '.join(directed) or 'the values of a metric with a better direction'}"
                )

    def _report(self, point: Point) -> None:
        values = {f"monitor/{name}": value for name, value in point.values.items()}
        values |= {f"monitor/training/{name}": value for name, value in point.training.items()}
        if not values:
            return
        values |= {"monitor/seconds": round(self.seconds, 3), "monitor/share_of_time": round(self.share, 4)}
        self.reporter.append(point.step, values)
        shown = [f"{name} {value:.4g}" for name, value in point.values.items() if "/" not in name]
        log.info("step %d, held-out: %s%s", point.step, ", ".join(shown), " (best)" if self.at_best else "")
        assert self.settings is not None
        for message in divergences(self.points, self.settings.window):
            log.warning("%s", message)

    @property
    def share(self) -> float:
        """Fraction of this process's running time that was spent in measurements, from 0 to 1."""
        return self.seconds / max(self.reporter.log.seconds, 1e-9)

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint so far; None without ``monitor.keep_best``, or if none qualifies yet."""
        if self.settings is None or self.settings.keep_best is None:
            return None
        return best_checkpoint(self.points, self.settings.keep_best)

    @property
    def stops(self) -> bool:
        """Whether ``monitor.early_stop`` ends the run, because its metric no longer improves."""
        if self.settings is None or self.settings.early_stop is None:
            return False
        return is_over(self.points, self.settings.early_stop)

    @property
    def at_best(self) -> bool:
        """Whether the last measurement is that of `best_step`."""
        return bool(self.points) and self.best_step == self.points[-1].step

    def state(self) -> dict[str, Any]:
        """Returns the measurements and a hash of the monitor's settings, for `load`; the same in all processes."""
        fingerprint = None if self.settings is None else self.settings.fingerprint()
        return {"fingerprint": fingerprint, "points": [point.state() for point in self.points]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores the measurements from the result of `state`.

        If the settings of the section `monitor` have changed since, the measurements are discarded with a warning.
        """
        if self.settings is None or not state["points"]:
            return
        if state["fingerprint"] != self.settings.fingerprint():
            log.warning("the settings of the monitor have changed; its earlier measurements are discarded")
            return
        self.points = [Point(**point) for point in state["points"]]

    def close(self) -> None:
        """Logs how much time the measurements took, in seconds and in percent of the run."""
        if self.seconds and self.optimization.accelerator.is_main_process:
            total = self.reporter.log.seconds
            log.info("the monitor took %.0f s of %.0f s (%.1f%%)", self.seconds, total, 100 * self.share)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def training_values(means: Mapping[str, float]) -> dict[str, float]:
    """Selects the training metrics of a measurement: the mean reward, and the share that does not depend on the text.

    A decomposed reward logs the two parts of its score, ``text_relevant`` and ``text_irrelevant`` (LongAlign,
    section 4). The share is ``text_irrelevant / (text_relevant + text_irrelevant)``. It is omitted if the score, the
    sum of both parts, is not positive.

    Args:
        means: means of training metrics by name. With several rewards, names start with the reward's index, such as
            ``0/text_relevant``.

    Returns:
        ``reward``, and ``text_irrelevant_share`` of each decomposed reward, e.g. ``0/text_irrelevant_share`` with
        several rewards; empty if ``means`` has neither.
    """
    out = {"reward": means["reward"]} if "reward" in means else {}
    for name, irrelevant in means.items():
        start = name.removesuffix("text_irrelevant")
        relevant = means.get(f"{start}text_relevant")
        if start != name and relevant is not None and relevant + irrelevant > 0:
            out[f"{start}text_irrelevant_share"] = irrelevant / (relevant + irrelevant)
    return out


def by_prompt(rows: np.ndarray, seeds: int) -> list[float]:
    """Returns the mean over the images of each prompt.

    Args:
        rows: ``(prompts * seeds,)`` values of all images, prompt by prompt; NaN where an image has no value.
        seeds: number of images per prompt.

    Returns:
        One mean per prompt over its images with a value; NaN if there are none.
    """
    grouped = rows.reshape(-1, seeds)
    known = ~np.isnan(grouped)
    sums, counts = np.where(known, grouped, 0).sum(1), known.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist()
