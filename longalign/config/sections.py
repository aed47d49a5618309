"""Config classes of the sections of a run that are not parts: loop and cache."""

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
    """Settings of the training loop."""

    steps: PositiveInt = 1000
    """optimizer steps."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """items per process and micro-step."""
    accumulation: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """gradient accumulation: micro-steps per optimizer step."""
    lr: PositiveFloat = 3e-5
    """learning rate of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """decay rates of AdamW's first and second moment estimates."""
    weight_decay: NonNegativeFloat = 1e-2
    """weight decay of AdamW."""
    warmup: NonNegativeInt = 0
    """number of steps of linear learning-rate warmup from zero."""
    clip: PositiveFloat | None = 0.3
    """maximum gradient norm, or null for no clipping."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """mixed precision: "no", "bf16" or "fp16"; frozen modules are kept in this dtype (float32 for "no")."""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass to save memory. This covers the denoiser, the autoencoder if rewards
    score decoded images, and a trained reward.
    """
    channels_last: bool = False
    """use the channels-last memory format for denoiser and autoencoder; only for backbones with a UNet."""
    compile: bool | Literal["regional", "inductor", "cudagraphs", "aot_eager", "eager"] = False
    """compile the denoiser with ``torch.compile``: true (backend "inductor"), the name of a backend, or "regional":
    its transformer and residual blocks one by one, which compiles in less time.
    """
    cuda_graphs: bool = False
    """replay denoiser calls without gradient as CUDA graphs; for one process with a CUDA GPU. Calls with dropout are
    not replayed: set the LoRA's dropout to 0, or the reward trainer's ``dropout_steps`` to ``"gradient"``. The
    merged copies of the LoRA layers' weights, which sampling uses, are then kept in memory. Experimental: not yet run
    on a GPU.
    """
    mfu: bool | None = None
    """log ``mfu``, the model FLOPs utilization: the FLOPs of the denoiser's calls, without LoRA, divided by the time of
    the whole step and by the FLOPs per second of a large matrix product, measured at the start. null: on CUDA devices.
    """
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay of the exponential moving average of the trainable parameters, or null for none."""
    save_every: PositiveInt | None = 500
    """steps between checkpoints, or null for a single checkpoint at the end."""
    keep: PositiveInt | None = 2
    """number of newest checkpoints to keep, or null for all."""
    log_every: PositiveInt = 10
    """steps between log entries; values are averaged over these steps."""
    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(_listed, json_schema_input_type=OneOrMore)] = ()
    """additional loggers, "tensorboard" or "wandb"; one or a list."""
    workers: Annotated[int, Field(ge=0, le=1000)] = 0
    """number of data loading processes; 0: load in the training process."""


class CacheConfig(Section):
    """Latents and text states that ``longalign cache`` precomputes and training reads from disk.

    A cache is rejected if the encoder, autoencoder, data, precision or images have changed since it was made.
    """

    folder: Text
    """folder of the cache."""
    latents: bool | None = None
    """cache image latents; null to cache them if the data has images. Training samples from the cached posterior
    exactly as without a cache.
    """
    prompts: bool = True
    """cache the hidden states of the frozen text models; these models are then not loaded for training."""
