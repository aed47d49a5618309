"""Runs a trainer on accelerate: what is optimised is the trainer's business, how it runs is said here."""

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

from longalign import checkpoint as checkpointing
from longalign.checkpoint import redacted
from longalign.checks import output_problem
from longalign.config import to_dict
from longalign.data.stream import Stream
from longalign.encoders.base import Conditioning, Encoder
from longalign.errors import RunError
from longalign.locks import Lock
from longalign.rewards.guard import NonFiniteReward
from longalign.sharding import reshard
from longalign.trainers import fsdp
from longalign.trainers import resume as state
from longalign.trainers.base import DiffusionTrainer
from longalign.trainers.batches import load_batches, plan_batches
from longalign.trainers.folder import new_checkpoint, prune, publish, recover, resume_hint
from longalign.trainers.header import announce
from longalign.trainers.interrupt import Interruption, until_interrupted
from longalign.trainers.logs import Log, Means, flat
from longalign.trainers.stops import explained, keep_batch
from longalign.trainers.validation import draw, read
from longalign.weights import save_pickle

if TYPE_CHECKING:
    from longalign.compose import Composition

log = logging.getLogger("longalign")

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        checkpoint: folder of the last checkpoint.
        interrupted: whether it was stopped before its last step.
        signal: number of the signal that stopped this process; None where another one, or none, was asked to stop.
    """

    step: int
    checkpoint: Path
    interrupted: bool
    signal: int | None = None


def fit(composition: Composition, resume: str | Path | None = None) -> FitResult:
    """Trains a composition.

    Writes into the config's ``output``: ``log.jsonl``, ``checkpoint-<step>/``, ``validation/<step>/``. Ctrl-C, SIGTERM
    and SIGHUP finish the step, write a checkpoint and return.

    Args:
        composition: the run; its parts are built here, for this process.
        resume: a checkpoint of this run, or the run's folder, to resume as if it had not been interrupted. Of a folder
            it is the newest whole checkpoint; a folder without any yet starts the run.

    Raises:
        ValueError: if a tracker or the prompts of the validation are missing, the data does not fit the trainer,
            another process trains into the folder, there is a run in it already, or the checkpoint is of another run.
        RunError: if the run had to stop: out of memory, or a number was not finite.
        NonFiniteReward: after its image and prompt were saved in ``output/non-finite``.
    """
    with explained(composition.config):
        run = Run(composition, None if resume is None else Path(resume))
        try:
            with until_interrupted() as interrupted:
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
        self.validation = read(self.config.validation)
        self.accelerator = self._accelerator(composition)
        self.lock: Lock | None = None
        try:
            self._claim(resume)
            self._build(composition, resume)
        except BaseException:
            self._release()
            raise

    def _build(self, composition: Composition, resume: Path | None) -> None:
        self.resumed = None if resume is None else state.find(resume, self.output)
        if self.resumed is not None:
            self._check_resumed(self.resumed, composition)
        elif resume is not None:
            log.warning("there is no checkpoint in %s yet, so the run is started", resume)
        self.dtype = composition.runtime.dtype
        self._seed(self.config.seed)
        self.trainer = composition.trainer
        self.backbone = composition.backbone if self.config.backbone is not None else None
        self.encoder = composition.encoder if self.config.encoder is not None else None
        if self.loop.gradient_checkpointing:
            self.trainer.enable_gradient_checkpointing()
        if self.loop.channels_last and self.backbone is not None:
            self.backbone.use_channels_last()
        self.origin = state.origin(self.config, composition.data)
        if self.resumed is not None:
            state.check_same_origin(self.resumed, self.origin)
        self._prepare()
        # Processes start from the same weights and then draw different noise.
        self._seed(self.config.seed + self.accelerator.process_index)
        self.ema = None if self.loop.ema is None else EMAModel(self.parameters, decay=self.loop.ema)
        self.step, self.means = 0, Means()
        if self.resumed is not None:
            state.restore(self, self.resumed)
            if self.accelerator.is_main_process and self.resumed.checkpoint.parent.resolve() == self.output.resolve():
                prune(self.resumed.checkpoint, self.loop.keep)  # a kill may have come between the checkpoint and this
        self.batches = load_batches(
            composition.data,
            plan_batches(
                composition.data,
                self.loop.batch_size,
                self.config.seed,
                start=self.step * self.loop.accumulation,
                rank=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
            ),
            self.trainer.needs_images,
            self.loop.workers,
        )
        if self.accelerator.is_main_process:
            announce(self, composition.data)
        self.log = Log(self.output, self.step, self.loop.steps, self.accelerator.is_main_process)
        if self.loop.trackers:
            settings = dict(flat("", redacted(to_dict(self.config))))
            self._track("cannot be started", lambda: self.accelerator.init_trackers("longalign", settings))

    def _claim(self, resume: Path | None) -> None:
        """Makes the folder this run's own; the first process does so for all."""
        problem: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                self.lock = Lock(self.output)
                recover(self.output)
                own = resume is not None and self.output.resolve() in (resume.resolve(), *resume.resolve().parents)
                if not own and (found := output_problem(self.config)):
                    raise ValueError(found)
            except (ValueError, OSError) as error:
                problem = error
        if self._any(problem is not None):
            raise problem or ValueError(f"the first process cannot use {self.output}; it says why")

    def _check_resumed(self, resumed: state.State, composition: Composition) -> None:
        changes = state.check_same_run(resumed.config, self.config)
        if "loop.workers" in changes and isinstance(composition.data, Stream):
            raise ValueError(
                f"loop.workers was {changes['loop.workers'][0]} before, and the items of a stream are dealt to "
                "workers, so others would be repeated or omitted; change it back"
            )
        state.check_processes(resumed, self.accelerator.num_processes)
        for key, (old, new) in changes.items():
            log.warning("%s was %r before and is %r now", key, old, new)

    def _accelerator(self, composition: Composition) -> Accelerator:
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != self.loop.precision:
            AcceleratorState._reset_state()  # an earlier run of this process had another precision
        accelerator = Accelerator(
            mixed_precision=self.loop.precision,
            gradient_accumulation_steps=self.loop.accumulation,
            cpu=composition.runtime.device == "cpu",
            log_with=list(self.loop.trackers) or None,
            project_dir=str(self.output),
            # The networks' buffers are constants. One process alone draws images and writes files; others wait.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),
            ],
        )
        if accelerator.distributed_type in ENGINES:
            raise ValueError(
                f"{accelerator.distributed_type.value} runs the backward pass and the optimiser by an engine of its "
                "own, which this loop does not; expected one process, or several by accelerate's multi-GPU, multi-CPU "
                "or FSDP. docs/processes.md says more"
            )
        self.split = accelerator.distributed_type == DistributedType.FSDP
        if self.split:
            fsdp.check(accelerator.state.fsdp_plugin, accelerator.parallelism_config, composition.config)
        dynamo: Any = accelerator.state.dynamo_plugin
        if dynamo.backend.value != "NO":
            raise ValueError(
                "accelerate's dynamo_backend would compile the reading of texts too; expected 'no' there. To compile "
                "the denoiser set loop.compile"
            )
        if accelerator.num_processes > 1:
            composition.runtime = replace(
                composition.runtime,
                device=str(accelerator.device),
                gather=accelerator.gather,
                rank=accelerator.process_index,
                processes=accelerator.num_processes,
            )
        return accelerator

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _prepare(self) -> None:
        """Hands what is trained to accelerate: the denoiser, the encoder if its adapter is trained, or what the trainer
        has instead; and the optimiser."""
        self.wrapped: list[Any]
        self.optimizer: Any
        self.apart: list[nn.Parameter] = []
        if self.split:
            denoiser, self.optimizer, self.apart = fsdp.prepare(self.accelerator, self.trainer, self._adamw)
            self.wrapped = [denoiser]
        else:
            self.wrapped = self.trainer.prepare(self.accelerator.prepare)
            if isinstance(self.trainer, DiffusionTrainer):
                self._prepare_parts(self.trainer)
            self.optimizer = self.accelerator.prepare(self._adamw(self.trainer.trainable()))
        self.parameters = self.trainer.trainable()
        self.rates = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, lambda step: min(1.0, (step + 1) / max(self.loop.warmup, 1))
        )

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, self.loop.lr, betas=self.loop.betas, weight_decay=self.loop.weight_decay)

    def _prepare_parts(self, trainer: DiffusionTrainer) -> None:
        denoiser: Any = trainer.backbone.denoiser
        if any(p.requires_grad for p in denoiser.parameters()):
            denoiser = self.accelerator.prepare(denoiser)
            self.wrapped.append(denoiser)
        # The backbone keeps the network itself, so names of weights are those without wrapper or compiler.
        trainer.backbone.wrap_denoiser(_compiled(denoiser, self.loop.compile))
        if any(p.requires_grad for p in trainer.encoder.parameters()):
            self.wrapped.append(self.accelerator.prepare(_Encode(trainer.encoder)))
            trainer.wrap_encoder(self.wrapped[-1])

    def train(self, interrupted: Interruption) -> FitResult:
        """Runs to the last step, or to the end of the step in which it was interrupted."""
        folder = None if self.resumed is None else self.resumed.checkpoint
        if self.step == 0:
            self._draw()
        while self.step < self.loop.steps:
            self.trainer.train()
            self._optimise()
            self.step += 1
            self.log.advance()
            last = self.step == self.loop.steps
            if self.step % self.loop.log_every == 0 or last:
                self._report()
            stop = self._any(interrupted())
            if last or stop or (self.loop.save_every is not None and self.step % self.loop.save_every == 0):
                folder = self._save()
            if stop:
                break
            # after the checkpoint, so that what goes wrong here loses nothing
            if last or (self.config.validation is not None and self.step % self.config.validation.every == 0):
                self._draw()
        assert folder is not None  # steps are positive
        unfinished = self.step < self.loop.steps
        if unfinished:
            log.warning(
                "stopped after step %d of %d; to resume: longalign train %s --resume, or "
                "build_from_config('%s').fit(resume='%s')",
                *(self.step, self.loop.steps, folder, folder, folder),
            )
        return FitResult(self.step, folder, unfinished, interrupted.number if unfinished else None)

    def _optimise(self) -> None:
        """One optimiser step; adds its losses and metrics, averaged over its micro-steps, to what is logged."""
        found: list[dict[str, Tensor]] = []
        self.seen: list[Mapping[str, Any]] = []
        for _ in range(self.loop.accumulation):
            with self.accelerator.accumulate(*self.wrapped):
                self.seen.append(next(self.batches))
                found.append(self._step(self.seen[-1]))
                if self.split:
                    fsdp.finish(self.accelerator, self.wrapped[0], self.apart)
                if self.accelerator.sync_gradients:
                    found[-1]["grad_norm"] = self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.rate = self.rates.get_last_lr()[0]
        if self.accelerator.optimizer_step_was_skipped:
            self.means.skipped += 1
            return
        self.rates.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.trainer.on_optimizer_step()
        keys = dict.fromkeys(key for values in found for key in values)
        self.means.add({k: torch.stack([v[k].detach().float() for v in found if k in v]).mean() for k in keys})

    def _clip(self) -> Tensor:
        """Norm of the gradient of all processes, before it is cut to ``loop.clip``."""
        limit = math.inf if self.loop.clip is None else self.loop.clip
        norm = fsdp.number(self.accelerator.clip_grad_norm_(self.parameters, limit))
        # A scaler, which fp16 has, leaves such steps out and lowers its scale.
        if self.accelerator.scaler is None and not norm.isfinite():
            self._stop("the gradient is not finite", self.step + 1)
        return norm

    def _stop(self, what: str, step: int) -> None:
        """Ends a run whose numbers are not finite; what led to it is kept."""
        path = keep_batch(self.output, self.accelerator.process_index, step, self.seen)
        raise RunError(
            f"{what} at step {step}; its prompts are in {path}. No checkpoint was written since, and "
            f"{resume_hint(self.output)}. Lower loop.lr or loop.clip, or use another loop.precision"
        )

    def _step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The trainer's step. Where that goes backward several times, processes exchange gradients once, at its end."""
        exchanges = self.accelerator.num_processes > 1 and self.accelerator.sync_gradients and not self.split
        if not (exchanges and self.trainer.multiple_backward):
            return self.trainer.step(batch, self.accelerator.backward)
        with ExitStack() as apart:
            for module in self.wrapped:
                apart.enter_context(self.accelerator.no_sync(module))
            values = self.trainer.step(batch, self.accelerator.backward)
        with ExitStack() as together:
            for module in self.wrapped:
                together.enter_context(self.accelerator.trigger_sync_in_backward(module))
            # Zero changes no gradient, and comes to every parameter, which is when its gradient is exchanged.
            (0.0 * torch.stack([p.sum() for p in self.parameters]).sum()).backward()
        return values

    def _means(self) -> dict[str, float]:
        """What is logged, of all processes, since the last line. Raises RunError if a loss was not finite."""
        numbers = self.means.get(lambda means: self.accelerator.reduce(means.to(self.accelerator.device), "mean"))
        losses = {k: v for k, v in numbers.items() if k.endswith("_loss")}
        if not all(math.isfinite(v) for v in losses.values()):
            self._stop(f"the loss is not finite ({losses})", self.step)
        return {"loss": sum(losses.values()), **numbers} if losses else numbers

    def _report(self) -> None:
        numbers = {**self._means(), "lr": self.rate}
        if self.means.skipped:
            numbers["skipped_steps"] = self.means.skipped
        if cut := getattr(self.trainer, "num_truncated", 0):
            numbers["truncated_prompts"] = cut
        self.means = Means()
        self.log.write(self.step, numbers)
        for tracker in self.accelerator.trackers:
            self._track("did not take the numbers", lambda to=tracker: to.log(numbers, step=self.step))

    @staticmethod
    def _track(what: str, action: Callable[[], Any]) -> None:
        """Does what a tracker is asked to; training does not end where that fails."""
        try:
            action()
        except Exception as error:
            log.warning("a tracker %s (%s: %s); training continues", what, type(error).__name__, error)

    def _any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)  # type: ignore[operator]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the trained weights are their moving average, if there is one."""
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.split:
                reshard(self.wrapped[0])
            if self.ema is not None:
                self.ema.restore(self.parameters)

    def _draw(self) -> None:
        """Samples the validation prompts, if there are any, into ``validation/<step>/`` and sends the images to the
        trackers."""
        if self.config.validation is None:
            return
        first = self.accelerator.is_main_process
        if first or self.split:
            assert self.backbone is not None and self.encoder is not None
            folder = self.output / "validation" / f"{self.step:06d}" if first else None
            with self._averaged():
                images = draw(self.backbone, self.encoder, self.config.validation, self.validation, folder, self.step)
            for tracker in self.accelerator.trackers:
                self._track("did not take the images", lambda to=tracker: _show(to, images, self.step))
        self.accelerator.wait_for_everyone()

    def _save(self) -> Path:
        """Writes a checkpoint; it appears under its name when every process has written its part."""
        self._means()  # of losses that are not finite no checkpoint is made
        with new_checkpoint(self.output, self.step) as (unfinished, final):
            folder = unfinished / state.FOLDER
            folder.mkdir(exist_ok=True)
            if self.accelerator.is_main_process or self.split:
                with self._averaged():
                    weights = checkpointing.collect(self.backbone, self.encoder)
                    if self.accelerator.is_main_process:
                        checkpointing.write(unfinished, self.config, weights, self.step)
                        self.trainer.save(unfinished)
                shared = state.collect(self)
                if self.accelerator.is_main_process:
                    save_pickle(folder / "shared.pt", shared)
            save_pickle(folder / f"process-{self.accelerator.process_index}.pt", state.own_state(self))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                publish(unfinished, final, self.loop.keep)
        self.accelerator.wait_for_everyone()
        return final

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def close(self) -> None:
        """Ends trackers and the progress bar, lets others into the folder, and takes the wrappers off the parts."""
        self.log.close()
        self._release()
        for tracker in self.accelerator.trackers:
            self._track("cannot be ended", tracker.finish)
        self.trainer.prepare(lambda module: module)
        if isinstance(self.trainer, DiffusionTrainer):
            self.trainer.backbone.wrap_denoiser(self.trainer.backbone.denoiser)
            self.trainer.wrap_encoder(self.trainer.encoder.encode)
        for module in self.wrapped:
            self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


def _show(tracker: Any, images: Tensor, step: int) -> None:
    """Sends images ``(b, 3, h, w)`` in [0, 1] to a tracker of accelerate's."""
    if tracker.name == "tensorboard":
        tracker.log_images({"validation": images.numpy()}, step=step)
    elif hasattr(tracker, "log_images"):
        shown = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        tracker.log_images({"validation": list(shown)}, step=step)


def _compiled(denoiser: Any, how: bool | str) -> Any:
    """The denoiser compiled when it is first called, by a backend of torch's; True is inductor, False leaves it."""
    if not how:
        return denoiser
    backend = "inductor" if how is True else how
    # Random numbers as without compiling, so that a call that is repeated with gradient has the dropout of its first.
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(denoiser, backend=backend, options=options)


class _Encode(nn.Module):
    """An encoder whose forward pass is `encode`, as wrappers of accelerate call it."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        return self.encoder.encode(prompts)
