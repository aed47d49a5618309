"""Runs the training loop. Trainers define the losses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from longalign.compose import Composition
from longalign.config.run import RunConfig
from longalign.errors import RunError
from longalign.loop.batches import load_batches, plan_batches, read_buckets
from longalign.loop.folder import mark_best, prune, resume_hint
from longalign.loop.header import log_run_summary
from longalign.loop.interrupt import catch_signals
from longalign.loop.logs import MetricMeans
from longalign.loop.monitor import Monitor, build_metrics
from longalign.loop.optimization import Optimization
from longalign.loop.output import claim_output
from longalign.loop.reporter import Reporter
from longalign.loop.resume_checks import check_resumable, check_same_inputs, input_fingerprints
from longalign.loop.resume_state import find_state, restore_state
from longalign.loop.saving import save_checkpoint
from longalign.loop.setup import any_process, check_cuda_graphs, make_accelerator, process_runtime, seed_generators
from longalign.loop.stops import explain_errors, explain_non_finite
from longalign.loop.utilization import make_utilization
from longalign.rewards.guard import NonFiniteReward
from longalign.runtime import Runtime

log = logging.getLogger("longalign")


@dataclass(frozen=True)
class FitResult:
    """Result of a run.

    Attributes:
        step: number of completed optimizer steps.
        checkpoint: folder of the last checkpoint.
        interrupted: whether a signal such as Ctrl-C stopped the run before its end. A run that ``monitor.early_stop``
            ended is not interrupted.
        signal: number of the signal that stopped the run; None if it was not interrupted, or if only another process
            received the signal.
    """

    step: int
    checkpoint: Path
    interrupted: bool
    signal: int | None = None


def train(config: RunConfig, runtime: Runtime, resume: Path | None = None) -> FitResult:
    """Trains as `longalign.loop.fit.fit` does, with a validated config; raises the same errors.

    Args:
        config: config of the run, with a trainer.
        runtime: device and dtype; with several processes, each gets its own device.
        resume: a checkpoint of this run, or the run's folder; None starts a new run.
    """
    with explain_errors(config):
        run = Run(config, runtime, resume)
        try:
            with catch_signals() as interrupted:
                result = run.train(interrupted)
            return replace(result, signal=interrupted.number) if result.interrupted else result
        except NonFiniteReward as error:
            error.save(run.output / "non-finite" / f"process-{run.accelerator.process_index}")
            error.args = (f"{error}; {resume_hint(run.output)}",)
            raise
        except Exception as error:
            if not isinstance(error, RunError):
                error.add_note(f"the run in {run.output} stopped; {resume_hint(run.output)}")
            raise
        finally:
            run.close()


class Run:
    """A training run in this process: builds its parts, takes optimizer steps, logs, measures and saves.

    Args:
        config: config of the run, with a trainer.
        runtime: device and dtype; with several processes, each gets its own device.
        resume: a checkpoint of this run, or the run's folder; None starts a new run.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, resume: Path | None = None):
        self.config, self.loop, self.output = config, config.loop, Path(config.output)
        prompts = [] if config.monitor is None else config.monitor.texts(runtime)
        self.accelerator = make_accelerator(config, runtime.device)
        check_cuda_graphs(config.loop, self.accelerator)
        self.composition = Composition(config, process_runtime(self.accelerator, runtime))
        self.lock = claim_output(config, self.accelerator, resume)
        try:
            self._build(resume, prompts)
        except BaseException:
            self._unlock()
            raise

    def _build(self, resume: Path | None, prompts: list[str]) -> None:
        composition, accelerator = self.composition, self.accelerator
        resumed = None if resume is None else find_state(resume, self.output)
        if resumed is not None:
            check_resumable(resumed, composition, accelerator.num_processes)
        elif resume is not None:
            log.warning("no checkpoint in %s yet; starting the run", resume)
        seed_generators(self.config.seed)
        trainer = composition.trainer
        if self.loop.gradient_checkpointing:
            trainer.enable_gradient_checkpointing()
        if self.loop.channels_last and self.config.backbone is not None:
            composition.backbone.use_channels_last()
        self.buckets = read_buckets(composition.data, composition.runtime) if trainer.needs_images else None
        self.origin = input_fingerprints(self.config, composition.data, self.buckets)
        if resumed is not None:
            check_same_inputs(resumed, self.origin)
        self.optimization = Optimization(accelerator, trainer, self.loop)
        if self.loop.cuda_graphs and self.config.backbone is not None:
            composition.backbone.use_cuda_graphs()
        metrics = build_metrics(self.config.monitor if accelerator.is_main_process else None, composition.runtime)
        # Processes start from the same weights, but sample different noise.
        seed_generators(self.config.seed + accelerator.process_index)
        self.utilization = None
        if self.config.backbone is not None:
            self.utilization = make_utilization(self.loop, composition.backbone)
        self.step, means, monitor_means = 0, MetricMeans(), MetricMeans()
        if resumed is not None:
            self.step = restore_state(resumed, self.optimization, means, monitor_means)
        self.folder = None if resumed is None else resumed.checkpoint
        batches = plan_batches(
            composition.data,
            self.loop.batch_size,
            self.config.seed,
            start=self.step * self.loop.accumulation,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            buckets=self.buckets,
        )
        self.batches = load_batches(
            composition.data,
            batches,
            trainer.needs_images,
            self.loop.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.reporter = Reporter(accelerator, self.config, self.step, means)
        self.monitor = Monitor(composition, self.optimization, prompts, metrics, self.reporter)
        if accelerator.is_main_process:
            log_run_summary(composition, self.optimization, self.step, len(self.monitor.rows))
        if resumed is not None:
            self.monitor.means = monitor_means
            self.monitor.load(resumed.shared["monitor"])
            if accelerator.is_main_process and resumed.checkpoint.parent.resolve() == self.output.resolve():
                # the run may have been killed after writing the checkpoint and before removing old ones
                if self.monitor.best_step == self.step:
                    mark_best(resumed.checkpoint)
                prune(resumed.checkpoint, self.loop.keep)

    def train(self, interrupted: Callable[[], bool]) -> FitResult:
        """Trains to the last step, unless the run ends early.

        It ends early after a step if ``interrupted`` then returns True in any process, or if ``monitor.early_stop``
        ends it. A checkpoint is written in each case.
        """
        if self._measure() and self.step:  # an interruption came before the measurement
            self.folder = self._save()
        # Once per run: walking all modules costs time, and whoever sets eval mode for a while restores all modes.
        self.composition.trainer.train()
        while self.step < self.loop.steps and not self.monitor.stops:
            self._take_step()
            last = self.step == self.loop.steps
            if self.step % self.loop.log_every == 0 or last:
                self._log()
            stop = any_process(self.accelerator, interrupted())
            if stop:
                self.folder = self._save()
                break
            measured = self._measure()
            saves = self.loop.save_every is not None and self.step % self.loop.save_every == 0
            if last or saves or self.monitor.stops or (measured and self.monitor.at_best):
                self.folder = self._save()
        assert self.folder is not None  # steps are positive
        unfinished = self.step < self.loop.steps and not self.monitor.stops
        if self.monitor.stops:
            log.info("stopped at step %d of %d: monitor.early_stop", self.step, self.loop.steps)
        if unfinished:
            log.warning(
                "stopped after step %d of %d; to resume: longalign train %s --resume, or longalign.fit('%s', "
                "resume='%s')",
                *(self.step, self.loop.steps, self.folder, self.folder, self.folder),
            )
        return FitResult(self.step, self.folder, unfinished)

    def _take_step(self) -> None:
        if self.utilization is not None:
            self.utilization.start()
        with explain_non_finite(self.optimization, self.output, self.step + 1):
            metrics = self.optimization.step(self.batches)
        if metrics is not None and self.utilization is not None:
            metrics |= self.utilization.end()
        self.step += 1
        self.reporter.add(metrics)
        if metrics is not None and self.config.monitor is not None:
            self.monitor.means.add(metrics)

    def _measure(self) -> bool:
        """Runs the monitor if a measurement is due; returns whether it was.

        If the measurement fails, a checkpoint is written before the error is raised.
        """
        if not self.monitor.is_due(self.step):
            return False
        if (failure := self.monitor.run(self.step)) is not None:
            if self.step:
                self._save()
            raise failure
        return True

    def _log(self) -> None:
        with explain_non_finite(self.optimization, self.output, self.step):
            self.reporter.write(self.step, self.optimization.lr, self.composition.trainer.num_truncated)

    def _save(self) -> Path:
        with explain_non_finite(self.optimization, self.output, self.step):
            self.reporter.current()  # raises if a loss is not finite, so no such checkpoint is written
        return save_checkpoint(
            self.composition, self.optimization, self.reporter.means, self.monitor, self.origin, self.step
        )

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def close(self) -> None:
        """Closes log and trackers, logs the monitor's cost, unlocks the output folder, and unwraps the modules."""
        self.reporter.log.close()
        self.monitor.close()
        self._unlock()
        self.reporter.trackers.finish()
        self.optimization.close()
