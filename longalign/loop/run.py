"""The training loop on accelerate. Trainers define the losses; this module runs them."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from longalign.checkpoints import checkpoint
from longalign.checkpoints.redaction import redacted
from longalign.checkpoints.weights import save_pickle
from longalign.config.checks import output_problem
from longalign.config.run import to_dict
from longalign.data.stream import Stream
from longalign.encoders.base import Conditioning, Encoder
from longalign.errors import RunError
from longalign.loop.batches import load_batches, plan_batches
from longalign.loop.folder import new_checkpoint, prune, publish, recover, resume_hint
from longalign.loop.fsdp import check_fsdp_config, finish_backward, prepare_fsdp, to_local_scalar
from longalign.loop.header import log_run_summary
from longalign.loop.interrupt import Interruption, catch_signals
from longalign.loop.locks import Lock
from longalign.loop.logs import Log, MetricMeans, flatten_config
from longalign.loop.state import (
    FOLDER,
    ResumeState,
    check_num_processes,
    check_same_inputs,
    check_same_run,
    find_state,
    input_fingerprints,
    process_state,
    restore_state,
    shared_state,
)
from longalign.loop.stops import explain_errors, save_failed_batch
from longalign.loop.validation import read_validation_prompts, sample_validation
from longalign.rewards.guard import NonFiniteReward
from longalign.sharding import reshard
from longalign.trainers.base import DiffusionTrainer

if TYPE_CHECKING:
    from longalign.compose import Composition

log = logging.getLogger("longalign")

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class FitResult:
    """Result of a run.

    Attributes:
        step: number of completed optimizer steps.
        checkpoint: folder of the last checkpoint.
        interrupted: whether the run was stopped before its last step.
        signal: number of the signal that stopped the run; None if it was not interrupted, or if only another process
            received the signal.
    """

    step: int
    checkpoint: Path
    interrupted: bool
    signal: int | None = None


def fit(composition: Composition, resume: str | Path | None = None) -> FitResult:
    """Trains a composition.

    Writes to the config's ``output``: ``log.jsonl``, ``checkpoint-<step>/``, ``validation/<step>/``. On Ctrl-C,
    SIGTERM and SIGHUP, finishes the current step, writes a checkpoint and returns.

    Args:
        composition: the run; its parts are built here, for this process.
        resume: a checkpoint of this run, or the run's folder, to resume exactly. A folder stands for its newest intact
            checkpoint; the run's own output without a checkpoint starts the run.

    Raises:
        ValueError: if a tracker or the validation prompts are missing, the data does not fit the trainer, another
            process trains into the folder, the folder contains a run, or the checkpoint belongs to a different run.
        RunError: if the run had to stop: out of memory, or a non-finite loss or gradient.
        NonFiniteReward: if a score is not finite. Its image and prompt are saved in ``output/non-finite``.
    """
    with explain_errors(composition.config):
        run = Run(composition, None if resume is None else Path(resume))
        try:
            with catch_signals() as interrupted:
                return run.train(interrupted)
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
    """The state of a run in this process."""

    def __init__(self, composition: Composition, resume: Path | None):
        self.config = composition.config
        self.loop, self.output = self.config.loop, Path(self.config.output)
        self.validation_prompts = read_validation_prompts(self.config.validation)
        self.accelerator = self._accelerator(composition)
        self.lock: Lock | None = None
        try:
            self._claim(resume)
            self._build(composition, resume)
        except BaseException:
            self._release()
            raise

    def _build(self, composition: Composition, resume: Path | None) -> None:
        self.resumed = None if resume is None else find_state(resume, self.output)
        if self.resumed is not None:
            self._check_resumed(self.resumed, composition)
        elif resume is not None:
            log.warning("no checkpoint in %s yet; starting the run", resume)
        self.dtype = composition.runtime.dtype
        self._seed(self.config.seed)
        self.trainer = composition.trainer
        self.backbone = composition.backbone if self.config.backbone is not None else None
        self.encoder = composition.encoder if self.config.encoder is not None else None
        if self.loop.gradient_checkpointing:
            self.trainer.enable_gradient_checkpointing()
        if self.loop.channels_last and self.backbone is not None:
            self.backbone.use_channels_last()
        self.origin = input_fingerprints(self.config, composition.data)
        if self.resumed is not None:
            check_same_inputs(self.resumed, self.origin)
        self._prepare()
        # Processes start from the same weights, but sample different noise.
        self._seed(self.config.seed + self.accelerator.process_index)
        self.ema = None if self.loop.ema is None else EMAModel(self.parameters, decay=self.loop.ema)
        self.step, self.means = 0, MetricMeans()
        if self.resumed is not None:
            restore_state(self, self.resumed)
            if self.accelerator.is_main_process and self.resumed.checkpoint.parent.resolve() == self.output.resolve():
                # the run may have been killed after writing the checkpoint and before removing old ones
                prune(self.resumed.checkpoint, self.loop.keep)
        self.batches = load_batches(
            composition.data,
            plan_batches(
                composition.data,
                self.loop.batch_size,
                self.config.seed,
                start=self.step * self.loop.accumulation,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            ),
            self.trainer.needs_images,
            self.loop.workers,
        )
        if self.accelerator.is_main_process:
            log_run_summary(self, composition.data)
        self.log = Log(self.output, self.step, self.loop.steps, self.accelerator.is_main_process)
        if self.loop.trackers:
            settings = dict(flatten_config("", redacted(to_dict(self.config))))
            self._track("failed to start", lambda: self.accelerator.init_trackers("longalign", settings))

    def _claim(self, resume: Path | None) -> None:
        """Locks and checks the output folder; the first process does so for all."""
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                self.lock = Lock(self.output)
                recover(self.output)
                resumed = resume is not None and self.output.resolve() in (resume.resolve(), *resume.resolve().parents)
                if not resumed and (problem := output_problem(self.config)):
                    raise ValueError(problem)
            except (ValueError, OSError) as error:
                failure = error
        if self._any_process(failure is not None):
            raise failure or ValueError(f"the first process cannot use {self.output}; see its error message")

    def _check_resumed(self, resumed: ResumeState, composition: Composition) -> None:
        changes = check_same_run(resumed.config, self.config)
        if "loop.workers" in changes and isinstance(composition.data, Stream):
            raise ValueError(
                f"loop.workers was {changes['loop.workers'][0]} before and is {changes['loop.workers'][1]} now, which "
                "would repeat and omit items of a stream; change it back"
            )
        check_num_processes(resumed, self.accelerator.num_processes)
        for key, (old, new) in changes.items():
            log.warning("%s was %r before and is %r now", key, old, new)

    def _accelerator(self, composition: Composition) -> Accelerator:
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != self.loop.precision:
            AcceleratorState._reset_state()  # an earlier run in this process had a different precision
        accelerator = Accelerator(
            mixed_precision=self.loop.precision,
            gradient_accumulation_steps=self.loop.accumulation,
            cpu=composition.runtime.device == "cpu",
            log_with=list(self.loop.trackers) or None,
            project_dir=str(self.output),
            # Buffers are constant. Processes wait while one samples images and writes files, hence the long timeout.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),
            ],
        )
        if accelerator.distributed_type in ENGINES:
            raise ValueError(
                f"{accelerator.distributed_type.value} is not supported; use one process, or accelerate's multi-GPU, "
                "multi-CPU or FSDP. See docs/processes.md"
            )
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded:
            check_fsdp_config(accelerator.state.fsdp_plugin, accelerator.parallelism_config, composition.config)
        dynamo: Any = accelerator.state.dynamo_plugin
        if dynamo.backend.value != "NO":
            raise ValueError(
                f"accelerate's dynamo_backend is {dynamo.backend.value}, which would compile text encoding too; set it "
                "to 'no'. To compile only the denoiser, set loop.compile"
            )
        if accelerator.num_processes > 1:
            composition.runtime = replace(
                composition.runtime,
                device=str(accelerator.device),
                gather=accelerator.gather,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        return accelerator

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _prepare(self) -> None:
        """Wraps the trainable modules and the optimizer with accelerate.

        The modules are the denoiser, the encoder if its adapter is trained, and those of `Trainer.prepare`.
        """
        self.wrapped: list[Any]
        self.optimizer: Any
        self.unsharded: list[nn.Parameter] = []
        if self.sharded:
            denoiser, self.optimizer, self.unsharded = prepare_fsdp(self.accelerator, self.trainer, self._adamw)
            self.wrapped = [denoiser]
        else:
            self.wrapped = self.trainer.prepare(self.accelerator.prepare)
            if isinstance(self.trainer, DiffusionTrainer):
                self._prepare_parts(self.trainer)
            self.optimizer = self.accelerator.prepare(self._adamw(self.trainer.trainable()))
        self.parameters = self.trainer.trainable()
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, lambda step: min(1.0, (step + 1) / max(self.loop.warmup, 1))
        )

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, self.loop.lr, betas=self.loop.betas, weight_decay=self.loop.weight_decay)

    def _prepare_parts(self, trainer: DiffusionTrainer) -> None:
        denoiser: Any = trainer.backbone.denoiser
        if any(p.requires_grad for p in denoiser.parameters()):
            denoiser = self.accelerator.prepare(denoiser)
            self.wrapped.append(denoiser)
        # The backbone keeps the unwrapped network, so that weight names have no prefix of a wrapper or compiler.
        trainer.backbone.wrap_denoiser(_compiled(denoiser, self.loop.compile))
        if any(p.requires_grad for p in trainer.encoder.parameters()):
            self.wrapped.append(self.accelerator.prepare(_Encode(trainer.encoder)))
            trainer.wrap_encoder(self.wrapped[-1])

    def train(self, interrupted: Interruption) -> FitResult:
        """Trains to the last step, or to the end of the step in which the run is interrupted."""
        folder = None if self.resumed is None else self.resumed.checkpoint
        if self.step == 0:
            self._validate()
        while self.step < self.loop.steps:
            self.trainer.train()
            self._optimizer_step()
            self.step += 1
            self.log.advance()
            last = self.step == self.loop.steps
            if self.step % self.loop.log_every == 0 or last:
                self._log_metrics()
            stop = self._any_process(interrupted())
            if last or stop or (self.loop.save_every is not None and self.step % self.loop.save_every == 0):
                folder = self._save()
            if stop:
                break
            # after the checkpoint, so that an error here loses no training
            if last or (self.config.validation is not None and self.step % self.config.validation.every == 0):
                self._validate()
        assert folder is not None  # steps are positive
        unfinished = self.step < self.loop.steps
        if unfinished:
            log.warning(
                "stopped after step %d of %d; to resume: longalign train %s --resume, or "
                "build_from_config('%s').fit(resume='%s')",
                *(self.step, self.loop.steps, folder, folder, folder),
            )
        return FitResult(self.step, folder, unfinished, interrupted.number if unfinished else None)

    def _optimizer_step(self) -> None:
        """Takes one optimizer step and records its losses and metrics, averaged over micro-steps."""
        metrics: list[dict[str, Tensor]] = []
        self.step_batches: list[Mapping[str, Any]] = []
        for _ in range(self.loop.accumulation):
            with self.accelerator.accumulate(*self.wrapped):
                self.step_batches.append(next(self.batches))
                metrics.append(self._micro_step(self.step_batches[-1]))
                if self.sharded:
                    finish_backward(self.accelerator, self.wrapped[0], self.unsharded)
                if self.accelerator.sync_gradients:
                    metrics[-1]["grad_norm"] = self._clip_gradient()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.lr = self.lr_scheduler.get_last_lr()[0]
        if self.accelerator.optimizer_step_was_skipped:
            self.means.skipped += 1
            return
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.trainer.on_optimizer_step()
        keys = dict.fromkeys(key for values in metrics for key in values)
        self.means.add({k: torch.stack([v[k].detach().float() for v in metrics if k in v]).mean() for k in keys})

    def _clip_gradient(self) -> Tensor:
        """Clips the gradient norm to ``loop.clip``; returns the norm before clipping, over all processes."""
        limit = math.inf if self.loop.clip is None else self.loop.clip
        norm = to_local_scalar(self.accelerator.clip_grad_norm_(self.parameters, limit))
        # With fp16, the gradient scaler skips steps with a non-finite gradient.
        if self.accelerator.scaler is None and not norm.isfinite():
            self._stop_non_finite("the gradient is not finite", self.step + 1)
        return norm

    def _stop_non_finite(self, problem: str, step: int) -> None:
        """Saves the step's prompts and raises RunError."""
        path = save_failed_batch(self.output, self.accelerator.process_index, step, self.step_batches)
        raise RunError(
            f"{problem} at step {step}; its prompts are in {path}. No checkpoint was written since; "
            f"{resume_hint(self.output)}. Lower loop.lr or loop.clip, or change loop.precision"
        )

    def _micro_step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Runs the trainer's step. Processes exchange gradients once at the end, also after several backward calls."""
        exchanges = self.accelerator.num_processes > 1 and self.accelerator.sync_gradients and not self.sharded
        if not (exchanges and self.trainer.multiple_backward):
            return self.trainer.step(batch, self.accelerator.backward)
        with ExitStack() as no_sync:
            for module in self.wrapped:
                no_sync.enter_context(self.accelerator.no_sync(module))
            values = self.trainer.step(batch, self.accelerator.backward)
        with ExitStack() as sync:
            for module in self.wrapped:
                sync.enter_context(self.accelerator.trigger_sync_in_backward(module))
            # A zero loss over all parameters leaves gradients unchanged and triggers their exchange.
            (0.0 * torch.stack([p.sum() for p in self.parameters]).sum()).backward()
        return values

    def _reduced_metrics(self) -> dict[str, float]:
        """Returns the means since the last log line over all processes. Raises RunError if a loss is not finite."""
        metrics = self.means.get(lambda means: self.accelerator.reduce(means.to(self.accelerator.device), "mean"))
        losses = {k: v for k, v in metrics.items() if k.endswith("_loss")}
        if not all(math.isfinite(v) for v in losses.values()):
            self._stop_non_finite(f"the loss is not finite ({losses})", self.step)
        return {"loss": sum(losses.values()), **metrics} if losses else metrics

    def _log_metrics(self) -> None:
        metrics = {**self._reduced_metrics(), "lr": self.lr}
        if self.means.skipped:
            metrics["skipped_steps"] = self.means.skipped
        if num_truncated := getattr(self.trainer, "num_truncated", 0):
            metrics["truncated_prompts"] = num_truncated
        self.means = MetricMeans()
        self.log.write(self.step, metrics)
        for tracker in self.accelerator.trackers:
            self._track("failed to log metrics", lambda to=tracker: to.log(metrics, step=self.step))

    @staticmethod
    def _track(failure: str, action: Callable[[], Any]) -> None:
        """Runs an action of a tracker. If it fails, logs a warning and continues training."""
        try:
            action()
        except Exception as error:
            log.warning("a tracker %s (%s: %s); training continues", failure, type(error).__name__, error)

    def _any_process(self, flag: bool) -> bool:
        """Returns whether ``flag`` is true in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)  # type: ignore[operator]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Context manager: replaces the trainable weights by their moving average, if the run has one."""
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.sharded:
                reshard(self.wrapped[0])
            if self.ema is not None:
                self.ema.restore(self.parameters)

    def _validate(self) -> None:
        """Samples the validation prompts into ``validation/<step>/`` and sends the images to the trackers."""
        settings = self.config.validation
        if settings is None:
            return
        is_main = self.accelerator.is_main_process
        if is_main or self.sharded:
            assert self.backbone is not None and self.encoder is not None
            folder = self.output / "validation" / f"{self.step:06d}" if is_main else None
            with self._averaged():
                images = sample_validation(
                    self.backbone, self.encoder, settings, self.validation_prompts, folder, self.step
                )
            for tracker in self.accelerator.trackers:
                self._track("failed to log images", lambda to=tracker: _log_images(to, images, self.step))
        self.accelerator.wait_for_everyone()

    def _save(self) -> Path:
        """Writes a checkpoint, which gets its final name after every process has written its state."""
        self._reduced_metrics()  # raises if a loss is not finite, so no such checkpoint is written
        with new_checkpoint(self.output, self.step) as (unfinished, final):
            folder = unfinished / FOLDER
            folder.mkdir(exist_ok=True)
            if self.accelerator.is_main_process or self.sharded:
                with self._averaged():
                    weights = checkpoint.collect(self.backbone, self.encoder)
                    if self.accelerator.is_main_process:
                        checkpoint.write(unfinished, self.config, weights, self.step)
                        self.trainer.save(unfinished)
                shared = shared_state(self)
                if self.accelerator.is_main_process:
                    save_pickle(folder / "shared.pt", shared)
            save_pickle(folder / f"process-{self.accelerator.process_index}.pt", process_state(self))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                publish(unfinished, final, self.loop.keep)
        self.accelerator.wait_for_everyone()
        return final

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def close(self) -> None:
        """Closes trackers and the progress bar, unlocks the output folder, and unwraps the modules."""
        self.log.close()
        self._release()
        for tracker in self.accelerator.trackers:
            self._track("failed to finish", tracker.finish)
        self.trainer.prepare(lambda module: module)
        if isinstance(self.trainer, DiffusionTrainer):
            self.trainer.backbone.wrap_denoiser(self.trainer.backbone.denoiser)
            self.trainer.wrap_encoder(self.trainer.encoder.encode)
        for module in self.wrapped:
            self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


def _log_images(tracker: Any, images: Tensor, step: int) -> None:
    """Sends images ``(b, 3, h, w)`` in [0, 1] to a tracker of accelerate."""
    if tracker.name == "tensorboard":
        tracker.log_images({"validation": images.numpy()}, step=step)
    elif hasattr(tracker, "log_images"):
        arrays = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        tracker.log_images({"validation": list(arrays)}, step=step)


def _compiled(denoiser: Any, setting: bool | str) -> Any:
    """Returns the denoiser with `torch.compile` applied: True is the backend inductor, False does not compile."""
    if not setting:
        return denoiser
    backend = "inductor" if setting is True else setting
    # eager random numbers, so that a call replayed with gradient has the same dropout as the recorded call
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(denoiser, backend=backend, options=options)


class _Encode(nn.Module):
    """Wraps an encoder so that its forward pass is `encode`, as accelerate's wrappers expect."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        return self.encoder.encode(prompts)
