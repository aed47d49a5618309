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

from longalign import checkpoint as checkpoints
from longalign.config import load_config, to_dict
from longalign.data.stream import Stream
from longalign.encoders.base import Conditioning, Encoder
from longalign.files import checkpoint_file
from longalign.rewards.guard import NonFiniteReward
from longalign.sharding import let_go
from longalign.trainers import fsdp
from longalign.trainers import resume as state
from longalign.trainers.base import DiffusionTrainer
from longalign.trainers.batches import load_batches, plan_batches
from longalign.trainers.interrupt import until_interrupted
from longalign.trainers.logs import Log, check_trackers, check_unused, flat
from longalign.trainers.validation import draw

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
    """

    step: int
    checkpoint: Path
    interrupted: bool


def fit(composition: Composition, resume: str | Path | None = None) -> FitResult:
    """Trains a composition.

    Writes into the config's ``output``: ``log.jsonl``, ``checkpoint-<step>/``, ``validation/<step>/``. Ctrl-C finishes
    the step, writes a checkpoint and returns.

    Args:
        composition: the run; its parts are built here, for this process.
        resume: a checkpoint of this run, or the run's folder, to go on from as if it had not been interrupted.

    Raises:
        ValueError: if a tracker is missing, the data does not fit the trainer, or the checkpoint is of another run.
        NonFiniteReward: after its image and prompt were saved in ``output/non-finite``.
    """
    run = Run(composition, None if resume is None else checkpoint_file(Path(resume)).parent)
    try:
        with until_interrupted() as interrupted:
            return run.train(interrupted)
    except NonFiniteReward as error:
        error.save(run.output / "non-finite" / f"process-{run.accelerator.process_index}")
        raise
    finally:
        run.close()


class Run:
    """The state of a run in this process."""

    def __init__(self, composition: Composition, resume: Path | None):
        self.config = composition.config
        self.loop, self.output = self.config.loop, Path(self.config.output)
        check_trackers(self.loop.trackers)
        if resume is None:
            check_unused(self.output)
        else:
            changes = state.check_same_run(load_config(resume), self.config)
            if "loop.workers" in changes and isinstance(composition.data, Stream):
                raise ValueError(
                    f"loop.workers was {changes['loop.workers'][0]} before, and the items of a stream are dealt to "
                    "workers, so others would be repeated or left out; change it back"
                )
            for key, (old, new) in changes.items():
                log.warning("%s was %r before and is %r now", key, old, new)
        self.accelerator = self._accelerator(composition)
        self._seed(self.config.seed)
        self.trainer = composition.trainer
        self.backbone = composition.backbone if self.config.backbone is not None else None
        self.encoder = composition.encoder if self.config.encoder is not None else None
        if self.loop.gradient_checkpointing:
            self.trainer.enable_gradient_checkpointing()
        if self.loop.channels_last and self.backbone is not None:
            self.backbone.use_channels_last()
        self._prepare()
        # Processes start from the same weights and then draw different noise.
        self._seed(self.config.seed + self.accelerator.process_index)
        self.ema = None if self.loop.ema is None else EMAModel(self.parameters, decay=self.loop.ema)
        self.step = 0
        if resume is not None:
            state.restore(self, resume)
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
        self.output.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.output, self.step, self.loop.steps, self.accelerator.is_main_process)
        if self.loop.trackers:
            self.accelerator.init_trackers("longalign", dict(flat("", to_dict(self.config))))

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

    def train(self, interrupted: Callable[[], bool]) -> FitResult:
        """Runs to the last step, or to the end of the step in which it was interrupted."""
        folder = None
        while self.step < self.loop.steps:
            self.trainer.train()
            values = self._optimise()
            self.step += 1
            self.log.advance()
            if self.step % self.loop.log_every == 0 or self.step == self.loop.steps:
                self._report(values)
            stop = self._any(interrupted())
            drawing = self.config.validation
            if drawing is not None and self.step % drawing.every == 0 and not stop:
                self._draw()
            due = self.loop.save_every is not None and self.step % self.loop.save_every == 0
            folder = self._save() if due or stop or self.step == self.loop.steps else None
            if stop and self.step < self.loop.steps:
                log.warning(
                    "stopped after step %d of %d; to go on: longalign train %s --resume, or "
                    "build_from_config('%s').fit(resume='%s')",
                    *(self.step, self.loop.steps, folder, folder, folder),
                )
                break
        if folder is None:  # resumed after the last step
            folder = self._save()
        return FitResult(self.step, folder, self.step < self.loop.steps)

    def _optimise(self) -> dict[str, Tensor]:
        """One optimiser step; returns losses and metrics averaged over its micro-steps."""
        found: list[dict[str, Tensor]] = []
        for _ in range(self.loop.accumulation):
            with self.accelerator.accumulate(*self.wrapped):
                found.append(self._step(next(self.batches)))
                if self.split:
                    fsdp.finish(self.accelerator, self.wrapped[0], self.apart)
                if self.accelerator.sync_gradients:
                    found[-1]["grad_norm"] = self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.rate = self.rates.get_last_lr()[0]
        if not self.accelerator.optimizer_step_was_skipped:
            self.rates.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.trainer.updated()
        keys = dict.fromkeys(key for values in found for key in values)
        return {k: torch.stack([v[k].detach().float() for v in found if k in v]).mean() for k in keys}

    def _clip(self) -> Tensor:
        """Norm of the gradient of all processes, before it is cut to ``loop.clip``."""
        limit = math.inf if self.loop.clip is None else self.loop.clip
        norm = fsdp.number(self.accelerator.clip_grad_norm_(self.parameters, limit))
        # A scaler, which fp16 has, leaves such steps out and lowers its scale.
        if self.accelerator.scaler is None and not norm.isfinite():
            raise RuntimeError(
                f"the gradient is not finite at step {self.step + 1}; the weights are as they were before it, and the "
                f"last checkpoint is in {self.output}. Lower loop.lr or loop.clip, or use another loop.precision"
            )
        return norm

    def _step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The trainer's step. Where that goes backward several times, processes exchange gradients once, at its end."""
        exchanges = self.accelerator.num_processes > 1 and self.accelerator.sync_gradients and not self.split
        if not (exchanges and self.trainer.several_backwards):
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

    def _report(self, values: dict[str, Tensor]) -> None:
        stacked = torch.stack([v.to(self.accelerator.device) for v in values.values()])
        mean = self.accelerator.reduce(stacked, "mean").tolist()  # type: ignore[union-attr]
        numbers = dict(zip(values, mean, strict=True))
        losses = {k: v for k, v in numbers.items() if k.endswith("_loss")}
        if not all(math.isfinite(v) for v in losses.values()):
            raise RuntimeError(
                f"the loss is not finite at step {self.step}: {losses}; the last checkpoint is in {self.output}. "
                "Lower loop.lr or loop.clip, or use another loop.precision"
            )
        numbers = {"loss": sum(losses.values()), **numbers, "lr": self.rate}
        if cut := getattr(self.trainer, "num_cut", 0):
            numbers["cut_prompts"] = cut
        self.log.write(self.step, numbers)
        if self.loop.trackers:
            self.accelerator.log(numbers, step=self.step)

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
                let_go(self.wrapped[0])
            if self.ema is not None:
                self.ema.restore(self.parameters)

    def _draw(self) -> None:
        """Draws the validation prompts into ``validation/<step>/`` and sends the images to the trackers."""
        first = self.accelerator.is_main_process
        if first or self.split:
            assert self.config.validation is not None and self.backbone is not None and self.encoder is not None
            folder = self.output / "validation" / f"{self.step:06d}" if first else None
            with self._averaged():
                images = draw(self.backbone, self.encoder, self.config.validation, folder, self.step)
            for tracker in self.accelerator.trackers:
                shown = images.permute(0, 2, 3, 1).numpy()
                pictures: Any = shown if tracker.name == "tensorboard" else list((shown * 255).round().astype("uint8"))
                if hasattr(tracker, "log_images"):
                    tracker.log_images({"validation": pictures}, step=self.step)
        self.accelerator.wait_for_everyone()

    def _save(self) -> Path:
        """Writes a checkpoint; it appears under its name when every process has written its part."""
        final = self.output / f"checkpoint-{self.step:06d}"
        unfinished = self.output / f".{final.name}.unfinished"
        folder = unfinished / state.FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.accelerator.process_index
        if self.accelerator.is_main_process or self.split:
            with self._averaged():
                weights = checkpoints.collect(self.backbone, self.encoder)
                if self.accelerator.is_main_process:
                    checkpoints.write(unfinished, self.config, weights, self.step)
                    self.trainer.save(unfinished)
            shared = state.collect(self)
            if self.accelerator.is_main_process:
                torch.save(shared, folder / "shared.pt")
        torch.save(state.random_state(), folder / f"process-{rank}.pt")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state.publish(unfinished, final, self.loop.keep)
        self.accelerator.wait_for_everyone()
        return final

    def close(self) -> None:
        """Ends trackers and the progress bar, and takes the wrappers off the parts."""
        self.log.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.trainer.prepare(lambda module: module)
        if isinstance(self.trainer, DiffusionTrainer):
            self.trainer.backbone.wrap_denoiser(self.trainer.backbone.denoiser)
            self.trainer.wrap_encoder(self.trainer.encoder.encode)
        for module in self.wrapped:
            self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


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
