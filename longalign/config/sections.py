"""Config classes of the keys ``loop`` and ``cache`` of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from longalign.registry import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Tracker = Literal["tensorboard", "wandb"]
OneOrMore = Tracker | tuple[Tracker, ...]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class LoopConfig(Section):
    """Settings of the training loop. A step is an optimizer step unless stated otherwise."""

    steps: PositiveInt = 1000
    """number of optimizer steps of the run."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """number of data items (images with captions, pairs of images, or prompts) per process and micro-step."""
    accumulation: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """gradient accumulation: number of micro-steps (a forward and a backward pass) per optimizer step."""
    lr: PositiveFloat = 3e-5
    """learning rate of AdamW, constant after the warmup."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """decay rates of AdamW's first and second moment estimates."""
    weight_decay: NonNegativeFloat = 1e-2
    """weight decay coefficient of AdamW."""
    warmup: NonNegativeInt = 0
    """number of steps over which the learning rate rises linearly to ``lr``; 0: none."""
    clip: PositiveFloat | None = 0.3
    """maximum L2 norm of the gradient of all trainable parameters together; null: no clipping."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """mixed precision: "no", "bf16" or "fp16". Frozen text models, autoencoders and rewards are kept in this dtype
    (float32 for "no"); ``backbone.dtype`` sets that of the denoiser.
    """
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass to save memory. This covers the denoiser, the autoencoder if rewards
    score decoded images, and a trained reward.
    """
    channels_last: bool = False
    """use the channels-last memory format for denoiser and autoencoder; only for backbones with a UNet."""
    compile: bool | Literal["regional", "inductor", "cudagraphs", "aot_eager", "eager"] = False
    """compile the denoiser with ``torch.compile``: true (backend "inductor"), the name of a backend, or "regional" to
    compile its transformer and residual blocks one by one, which takes less time. false: not compiled.
    """
    cuda_graphs: bool = False
    """replay denoiser calls without gradient as CUDA graphs; for one process with a CUDA GPU. Calls with dropout are
    not replayed: set the LoRA's dropout to 0, or the reward trainer's ``dropout_steps`` to ``"gradient"``. The
    merged copies of the LoRA layers' weights, which sampling uses, are then kept in memory. Experimental: not yet run
    on a GPU.
    """
    mfu: bool | None = None
    """log ``mfu``, the model FLOPs utilization (arXiv 2204.02311), as a fraction. It is the number of FLOPs of the
    denoiser's calls, without LoRA, per second of the whole step, divided by the FLOPs per second of a large matrix
    product, measured at the start. null: only on CUDA devices.
    """
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay per step of the exponential moving average of the trainable parameters, which is then saved and sampled
    with; null: no average.
    """
    save_every: PositiveInt | None = 500
    """number of steps between checkpoints; null: a single checkpoint at the end."""
    keep: PositiveInt | None = 2
    """number of newest checkpoints to keep; older ones are deleted, except that of ``monitor.keep_best``. null: all."""
    log_every: PositiveInt = 10
    """number of steps between log entries; values are averaged over these steps."""
    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(_listed, json_schema_input_type=OneOrMore)] = ()
    """loggers besides the file ``log.jsonl``: "tensorboard", "wandb", or a list of both; empty: none."""
    workers: Annotated[int, Field(ge=0, le=1000)] = 0
    """number of data loading processes per training process; 0: the training process loads the data itself."""


class CacheConfig(Section):
    """Image latents and text states that ``longalign cache`` precomputes and training reads from disk.

    A cache is rejected if encoder, autoencoder, data, precision or image files have changed since it was computed.
    """

    folder: Text
    """folder that ``longalign cache`` writes to and training reads from."""
    latents: bool | None = None
    """cache the autoencoder's posteriors of the images; null: if the data has images. Training samples latents from the
    posteriors exactly as without a cache.
    """
    prompts: bool = True
    """cache the hidden states of the prompts; the frozen text models are then not loaded for training."""
