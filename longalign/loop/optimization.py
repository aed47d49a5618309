"""Takes the optimizer steps of a run, with accumulation, clipping, learning-rate warmup and moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from longalign.config.sections import LoopConfig
from longalign.loop.fsdp import finish_backward, prepare_fsdp, to_local_scalar
from longalign.loop.setup import is_sharded
from longalign.sharding import reshard
from longalign.trainers.base import Trainer

#: maximum number of variants that torch compiles of one function; its default of 8 is too small for a UNet's blocks
#: with a LoRA
RECOMPILE_LIMIT = 128


class NonFinite(Exception):
    """Raised if a loss or the norm of the gradient is NaN or infinite."""


class Optimization:
    """Takes a trainer's optimizer steps with AdamW. Until `close`, accelerate wraps the trainer's modules.

    Args:
        accelerator: accelerate's ``Accelerator``.
        trainer: the trainer, whose modules are wrapped and, if configured, compiled.
        loop: the section `loop` of the run's config.

    Attributes:
        sharded: whether FSDP shards the trainable parameters.
        wrapped: the wrapped modules.
        parameters: the trainable parameters.
        unsharded: with FSDP, the trainable parameters that are not sharded; otherwise empty.
        optimizer: AdamW, wrapped by accelerate.
        lr_scheduler: linear warmup of the learning rate.
        ema: exponential moving average of ``parameters``, or None without ``loop.ema``.
        lr: learning rate of the last optimizer step.
        batches: batches of the last optimizer step, one for each micro-step.
    """

    def __init__(self, accelerator: Accelerator, trainer: Trainer, loop: LoopConfig):
        self.accelerator, self.trainer, self.loop = accelerator, trainer, loop
        self.sharded = is_sharded(accelerator)
        self.wrapped: list[Any]
        self.optimizer: Any
        self.unsharded: list[nn.Parameter] = []
        if self.sharded:
            module, self.optimizer, self.unsharded = prepare_fsdp(accelerator, trainer, self._adamw)
            self.wrapped = [module]
        else:
            autocast: Any = accelerator.autocast
            trainer.autocast = autocast
            self.wrapped = trainer.prepare(accelerator.prepare)
            if loop.compile:
                trainer.compile_denoiser(compiler(loop.compile), blocks=loop.compile == "regional")
            self.optimizer = accelerator.prepare(self._adamw(trainer.trainable()))
        self.parameters = trainer.trainable()
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, lambda step: min(1.0, (step + 1) / max(loop.warmup, 1))
        )
        self.ema = None if loop.ema is None else EMAModel(self.parameters, decay=loop.ema)
        self.lr = 0.0
        self.batches: list[Mapping[str, Any]] = []

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        fused = all(parameter.is_cuda for parameter in parameters)  # on the CPU, torch's default is kept
        return torch.optim.AdamW(
            parameters, self.loop.lr, betas=self.loop.betas, weight_decay=self.loop.weight_decay, fused=fused or None
        )

    def step(self, batches: Iterator[Mapping[str, Any]]) -> dict[str, Tensor] | None:
        """Takes one optimizer step, which consists of ``loop.accumulation`` micro-steps with one batch each.

        Args:
            batches: yields this process's batches; see `longalign.loop.batches.collate`.

        Returns:
            Losses and metrics of this process by name, tensors ``()`` averaged over the micro-steps, and ``grad_norm``,
            the norm of the gradient. None if fp16's gradient scaler skipped the step.

        Raises:
            NonFinite: if the norm of the gradient is not finite, except with fp16.
        """
        metrics: list[dict[str, Tensor]] = []
        self.batches = []
        for _ in range(self.loop.accumulation):
            with self.accelerator.accumulate(*self.wrapped):
                self.batches.append(next(batches))
                metrics.append(self._micro_step(self.batches[-1]))
                if self.sharded:
                    finish_backward(self.accelerator, self.wrapped[0], self.unsharded)
                if self.accelerator.sync_gradients:
                    metrics[-1]["grad_norm"] = self._clip_gradient()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.lr = float(self.lr_scheduler.get_last_lr()[0])
        if self.accelerator.optimizer_step_was_skipped:
            return None
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.trainer.on_optimizer_step()
        keys = dict.fromkeys(key for values in metrics for key in values)
        return {k: torch.stack([v[k].detach().float() for v in metrics if k in v]).mean() for k in keys}

    def _micro_step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Calls ``trainer.step`` with one batch. Processes exchange gradients once, after the last backward call."""
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

    def _clip_gradient(self) -> Tensor:
        """Clips the gradient norm to ``loop.clip``; returns the norm before clipping, over all processes."""
        limit = math.inf if self.loop.clip is None else self.loop.clip
        norm = to_local_scalar(self.accelerator.clip_grad_norm_(self.parameters, limit))
        # With fp16, the gradient scaler skips steps with a non-finite gradient.
        if self.accelerator.scaler is None and not norm.isfinite():
            raise NonFinite(f"expected a finite norm of the gradient, got {float(norm)}")
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager: replaces the parameters by their moving average, if there is one, until exit."""
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

    def close(self) -> None:
        """Unwraps the modules and frees the optimizer's memory."""
        self.trainer.autocast = nullcontext
        self.trainer.prepare(lambda module: module)
        for module in self.wrapped:
            self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


def compiler(setting: bool | str) -> Callable[[Any], Any]:
    """Returns a function that compiles a module or function with ``torch.compile``.

    Also increases torch's global limits of recompilations.

    Args:
        setting: value of ``loop.compile``, not False: the name of a backend; True and ``"regional"`` select
            ``"inductor"``.
    """
    backend = setting if isinstance(setting, str) and setting != "regional" else "inductor"
    # eager random numbers, so that a call replayed with gradient has the same dropout as the recorded call
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    # Code is compiled for each shape of weights, and with and without gradient, merged LoRA and training mode.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * RECOMPILE_LIMIT)
    return partial(torch.compile, backend=backend, options=options)
