"""The configs of the encoder `ella` and its resampler; importing this module does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.encoders import T5Config
from longalign.hub import checkpoint_problem
from longalign.registry import PartConfig
from pydantic import Field, model_validator


class ResamplerConfig(PartConfig):
    """ELLA's resampler, loaded from ``checkpoint`` or newly initialized. The default sizes are the published ones."""

    target: ClassVar[str] = "longalign_ella.resampler:Resampler"

    name: Literal["ella"] = "ella"
    checkpoint: str | None = None
    """Hub id, e.g. ``QQGYLab/ELLA``, or a local folder, with the weights in ``file``; null: random weights."""
    file: str = "ella-sd1.5-tsc-t5xl.safetensors"
    """file of the weights in ``checkpoint``."""
    revision: str | None = None
    """branch, tag or commit of a Hub repository."""
    in_dim: int = Field(default=2048, ge=1)
    """width of T5's states."""
    width: int = Field(default=768, ge=1)
    """width of the resampled states, which the denoiser takes."""
    layers: int = Field(default=6, ge=1)
    """number of attention blocks."""
    heads: int = Field(default=8, ge=1)
    """number of attention heads."""
    queries: int = Field(default=64, ge=1)
    """number of learned queries, which is the number of states of every prompt."""
    time_channels: int = Field(default=320, ge=2, multiple_of=2)
    """number of sine and cosine features of a timestep."""
    time_dim: int = Field(default=768, ge=1)
    """width of the timestep embedding."""
    trainable: bool = True
    """whether the resampler is trained."""

    @model_validator(mode="after")
    def _check(self) -> ResamplerConfig:
        if self.width % self.heads:
            raise ValueError(f"expected a width divisible by heads, got width {self.width} and {self.heads} heads")
        changed = self.revision is not None or self.file != type(self).model_fields["file"].default
        if self.checkpoint is None and changed:
            raise ValueError("'file' and 'revision' require 'checkpoint'; set 'checkpoint' or remove both")
        return self

    def check_files(self) -> list[tuple[str, str]]:
        problem = "" if self.checkpoint is None else checkpoint_problem(self.checkpoint, [self.file], self.revision)
        return [("checkpoint", problem)] if problem else []


class EllaConfig(T5Config):
    """T5's states, resampled to a fixed number of states that depend on the timestep (ELLA, arXiv 2403.05135)."""

    name: Literal["ella"] = "ella"
    checkpoint: str = Field(default="google/flan-t5-xl", min_length=1)
    adapter: ResamplerConfig | None = ResamplerConfig(checkpoint="QQGYLab/ELLA")
    """the resampler; null: T5's states, as in a cache."""
    max_tokens: int = Field(default=128, ge=1)
    """number of T5's states, including the end-of-text token, to which shorter prompts are padded."""
    mask: bool | Literal["t5"] = True
    """where padding is masked: ``true`` masks it in T5 and in the resampler, ``"t5"`` only in T5. The authors'
    "flexible token length" has no padding, which ``true`` equals; their "fixed token length" is ``"t5"``.
    """

    def widths(self) -> tuple[int | None, int | None]:
        return super().widths() if self.adapter is None else (self.adapter.width, None)
