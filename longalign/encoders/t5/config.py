"""Configs of T5 and its adapter. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from longalign.encoders.config import LoadedConfig
from longalign.errors import ConfigProblem
from longalign.files.paths import join_subfolder
from longalign.hub import checkpoint_problem, read_json
from longalign.registry import PartConfig


class AdapterConfig(PartConfig):
    """LaVi-Bridge adapter (arXiv 2403.07860), which maps the states of a text model to the denoiser's width.

    Loaded from ``checkpoint``, or newly initialized with ``in_dim``, ``int_dim`` and ``out_dim``.
    """

    target: ClassVar[str] = "longalign.encoders.t5.adapter:TextAdapter"

    name: Literal["lavi-bridge"] = "lavi-bridge"
    checkpoint: str | None = None
    """Hub id or folder in diffusers layout, e.g. ``shihaozhao/LaVi-Bridge``; null: a new adapter."""
    subfolder: str | None = None
    """subfolder of the checkpoint, e.g. ``t5_unet/adapter``; null: the top level."""
    revision: str | None = None
    """branch, tag or commit of a Hub repository; null: the default branch."""
    in_dim: int | None = Field(None, ge=1)
    """for a new adapter: width of the text model's states, e.g. 1024 for T5-large; null with ``checkpoint``."""
    int_dim: int | None = Field(None, ge=1)
    """for a new adapter: width between the two feed-forward blocks, e.g. 896; null with ``checkpoint``."""
    out_dim: int | None = Field(None, ge=1)
    """for a new adapter: width that the denoiser expects, e.g. 768 for Stable Diffusion 1.5; null with ``checkpoint``.
    """
    trainable: bool = True
    """whether the adapter is trained; false: the adapter's weights are frozen."""

    def width(self) -> int | None:
        """Returns the adapter's output width, or None if the checkpoint's config.json is not available locally."""
        if self.checkpoint is None:
            return self.out_dim
        width = read_json(self.checkpoint, join_subfolder(self.subfolder, "config.json"), self.revision).get("out_dim")
        return width if isinstance(width, int) else None

    def check_files(self) -> list[ConfigProblem]:
        if self.checkpoint is None:
            return []
        config = [join_subfolder(self.subfolder, "config.json")]
        problem = checkpoint_problem(self.checkpoint, config, self.revision)
        return [("checkpoint", problem)] if problem else []

    @model_validator(mode="after")
    def _one_source(self) -> AdapterConfig:
        given = [key for key in ("in_dim", "int_dim", "out_dim") if getattr(self, key) is not None]
        if self.checkpoint is not None and given:
            raise ValueError(f"the widths are read from 'checkpoint'; remove {', '.join(given)}")
        if self.checkpoint is None and len(given) < 3:
            raise ValueError(
                "expected 'checkpoint' of an adapter, or in_dim, int_dim and out_dim of a new one, got "
                f"{' and '.join(given) or 'neither'}; set 'checkpoint', or all three widths"
            )
        if self.checkpoint is None and (self.subfolder or self.revision):
            raise ValueError("'subfolder' and 'revision' require 'checkpoint'; set 'checkpoint' or remove both")
        return self


class T5Config(LoadedConfig):
    """Encodes the whole prompt with T5's encoder, by default in windows of whole sentences if the prompt is long."""

    target: ClassVar[str] = "longalign.encoders.t5.encoder:T5Encoder"
    adapter_key: ClassVar[str | None] = "adapter"

    name: Literal["t5"] = "t5"
    checkpoint: str = Field(default="google-t5/t5-large", min_length=1)
    adapter: AdapterConfig | None = None
    """adapter that maps T5's states to the denoiser's width; null: T5's states are used without one."""
    max_tokens: int = Field(default=240, ge=1)
    """number of states to which shorter prompts are padded: one per token, including the end-of-text token."""
    overflow: Literal["grow", "truncate", "error"] = "grow"
    """what to do with prompts of more than ``max_tokens`` tokens: ``"grow"`` pads the batch to the longest prompt,
    ``"truncate"`` truncates with a warning, as in the published model, ``"error"`` raises.
    """
    window: int = Field(default=512, ge=2)
    """maximum number of tokens per forward pass, including the end-of-text token; T5 was trained with 512. With
    ``overflow: grow``, prompts longer than both ``window`` and ``max_tokens`` are encoded in windows of whole
    sentences, so that memory grows linearly with the length.
    """
    mask: bool | Literal["t5"] = False
    """what ignores padding: ``true``: T5 and the denoiser; ``"t5"``: only T5, so that the denoiser reads T5's states of
    the padding; ``false``: neither, as in the published model.
    """

    def widths(self) -> tuple[int | None, int | None]:
        return self._width_of("d_model") if self.adapter is None else self.adapter.width(), None
