"""The configs of the encoder `ella` and its resampler; importing this module does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.encoders import T5Config
from longalign.hub import checkpoint_problem
from longalign.registry import PartConfig
from pydantic import Field, model_validator


class ResamplerConfig(PartConfig):
    """ELLA's resampler, which maps T5's states and a timestep to a fixed number of states.

    It is loaded from ``checkpoint`` or newly initialized. The default sizes are those of the published weights.
    """

    target: ClassVar[str] = "longalign_ella.resampler:Resampler"

    name: Literal["ella"] = "ella"
    checkpoint: str | None = None
    """Hub id, e.g. ``QQGYLab/ELLA``, or local folder that contains ``file``; null: random weights."""
    file: str = "ella-sd1.5-tsc-t5xl.safetensors"
    """name of the safetensors file with the weights in ``checkpoint``."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository; null: its default branch."""
    in_dim: int = Field(default=2048, ge=1)
    """width of T5's states."""
    width: int = Field(default=768, ge=1)
    """width of the resampled states, which must be that of the denoiser's cross-attention."""
    layers: int = Field(default=6, ge=1)
    """number of attention blocks."""
    heads: int = Field(default=8, ge=1)
    """number of attention heads."""
    queries: int = Field(default=64, ge=1)
    """number of learned queries, and so of resampled states of every prompt."""
    time_channels: int = Field(default=320, ge=2, multiple_of=2)
    """number of sine and cosine features of a timestep, half of them of each kind."""
    time_dim: int = Field(default=768, ge=1)
    """width of the timestep embedding, which is computed from the sine and cosine features."""
    trainable: bool = True
    """whether the resampler can be trained; false: its weights are always frozen."""

    @model_validator(mode="after")
    def _check(self) -> ResamplerConfig:
        if self.width % self.heads:
            raise ValueError(
                f"expected a width divisible by heads, got width {self.width} and {self.heads} heads; change one"
            )
        changed = self.revision is not None or self.file != type(self).model_fields["file"].default
        if self.checkpoint is None and changed:
            raise ValueError("'file' and 'revision' require 'checkpoint'; set 'checkpoint' or remove both")
        return self

    def check_files(self) -> list[tuple[str, str]]:
        problem = "" if self.checkpoint is None else checkpoint_problem(self.checkpoint, [self.file], self.revision)
        return [("checkpoint", problem)] if problem else []


class EllaConfig(T5Config):
    """Encodes prompts with T5, and resamples its states to a fixed number of states (ELLA, arXiv 2403.05135).

    The resampled states depend on the timestep.
    """

    name: Literal["ella"] = "ella"
    checkpoint: str = Field(default="google/flan-t5-xl", min_length=1)
    adapter: ResamplerConfig | None = ResamplerConfig(checkpoint="QQGYLab/ELLA")
    """the resampler; null: T5's states are not resampled, as when they are computed for a cache."""
    max_tokens: int = Field(default=128, ge=1)
    """number of tokens, including the end-of-text token, to which shorter prompts are padded for T5; ``overflow`` sets
    what is done with longer ones.
    """
    mask: bool | Literal["t5"] = True
    """what ignores padding: ``true``: T5 and the resampler, which equals the authors' "flexible token length" without
    padding; ``"t5"``: only T5, their "fixed token length"; ``false``: neither.
    """

    def widths(self) -> tuple[int | None, int | None]:
        return super().widths() if self.adapter is None else (self.adapter.width, None)
