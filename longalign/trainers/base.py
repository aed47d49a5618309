"""Interface of trainers, which compute the loss of a batch. `longalign.loop` runs the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: calls ``backward`` of a scalar loss, which it may scale for mixed precision
Backward = Callable[[Tensor], None]
#: wraps a module, e.g. for distributed training; the wrapper is called like the module
Wrap = Callable[[nn.Module], Any]


class Trainer(nn.Module):
    """Base class of trainers, which define the losses and the trainable parameters.

    A subclass implements `loss` or, to call backward itself, `step`.
    """

    #: whether batches contain images; otherwise only prompts are loaded
    needs_images: bool = True
    #: whether `step` calls ``backward`` several times; processes then exchange gradients once, after the last call
    multiple_backward: bool = False
    #: number of truncated prompts so far in this process, which is logged
    num_truncated: int = 0
    #: returns the context of mixed precision in which the wrappers from `prepare` call their modules
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Computes losses and metrics of a batch.

        Args:
            batch: ``{"prompt": list[str], "image": (b, 3, h, w) in [0, 1]}``, without ``image`` if `needs_images` is
                False. With a latent cache, ``posterior`` ``(b, 2c, h, w)`` replaces ``image``; see
                `longalign.trainers.diffusion.batch_latents`.

        Returns:
            Tensors ``()`` by name. Values with a name that ends in ``_loss`` are summed and minimized; they require
            gradient. All other values are only logged.
        """
        raise NotImplementedError(f"{type(self).__name__} has no losses; implement loss or step")

    def step(self, batch: Mapping[str, Any], backward: Backward) -> dict[str, Tensor]:
        """Computes the gradient of a batch by calling ``backward`` on one or more scalars.

        By default, ``backward`` is called once, on the sum of the losses that `loss` returns. Trainers that override
        this method need not implement `loss`.

        Args:
            batch: see `loss`.
            backward: to be called instead of ``Tensor.backward``.

        Returns:
            Losses and metrics by name, tensors ``()`` without gradient.

        Raises:
            ValueError: if `loss` returns no value with a name that ends in ``_loss``.
        """
        losses = self.loss(batch)
        if not any(key.endswith("_loss") for key in losses):
            got = ", ".join(losses) or "nothing"
            raise ValueError(f"{type(self).__name__}.loss must return a value whose key ends in '_loss'; got {got}")
        backward(torch.stack([v for k, v in losses.items() if k.endswith("_loss")]).sum())
        return {key: value.detach() for key, value in losses.items()}

    def on_optimizer_step(self) -> None:
        """Called after each optimizer step, e.g. to update a moving average of the weights."""

    def trainable(self) -> list[nn.Parameter]:
        """Returns the trainable parameters."""
        return [p for p in self.parameters() if p.requires_grad]

    def prepare(self, wrap: Wrap) -> list[Any]:
        """Wraps the modules that are called with gradient, and returns the wrappers; by default an empty list.

        From then on, the trainer must call the wrappers instead of the modules.

        Args:
            wrap: prepares a module for distributed training and mixed precision. At the end of the run, `prepare` is
                called again with the identity function.
        """
        return []

    def compile_denoiser(self, compile: Callable[..., Any], blocks: bool = False) -> None:
        """Compiles the denoiser, or each of its blocks by itself. Called after `prepare`.

        Args:
            compile: compiles a module or function, e.g. ``torch.compile``.
            blocks: whether to compile each transformer and residual block instead of the whole denoiser.

        Raises:
            ValueError: if the trainer does not support compiling, which is the default.
        """
        raise ValueError(f"{type(self).__name__} does not support compiling; set loop.compile to false")

    def fsdp_module(self, precision: str) -> nn.Module:
        """Returns the module whose weights FSDP shards in place, i.e. the denoiser. Experimental.

        With FSDP, the training loop calls this method instead of `prepare`.

        Args:
            precision: accelerate's mixed precision, ``"no"`` or ``"bf16"``.

        Raises:
            ValueError: if FSDP cannot shard the weights of this trainer, which is the default.
        """
        raise ValueError(
            f"FSDP shards the weights of a denoiser, but {type(self).__name__} trains none; use accelerate's "
            "multi-GPU without FSDP"
        )

    def enable_gradient_checkpointing(self) -> None:
        """Enables gradient checkpointing: activations are recomputed in the backward pass to save memory.

        Raises:
            ValueError: if the trainer does not support gradient checkpointing, which is the default.
        """
        raise ValueError(
            f"{type(self).__name__} does not support gradient checkpointing; set loop.gradient_checkpointing to false"
        )

    def save(self, folder: Path) -> None:
        """Saves additional files to ``folder``, the folder of a checkpoint. By default there are none."""
