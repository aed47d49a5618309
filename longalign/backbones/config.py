"""Base class of backbone configs, and the config of LoRAs. Does not import torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from longalign.config.files import join_subfolder
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, checkpoint_problem, read_json
from longalign.registry import PartConfig, Section


class LoraConfig(Section):
    """Low-rank updates of the denoiser's Linear and Conv2d layers (arXiv 2106.09685).

    ``down`` is initialized from N(0, 1/rank^2) and ``up`` with zeros, so the update is zero at the start.
    """

    rank: int = Field(default=32, ge=1)
    """rank of the update."""
    scale: float = Field(default=1.0, gt=0)
    """scaling of the LoRA update (``lora_alpha / r`` in peft)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """dropout probability in the LoRA branch during training (``lora_dropout`` in peft)."""
    dropout_placement: Literal["down", "up"] = "down"
    """where dropout is applied: ``"down"`` to the input of the down projection, as in peft, or ``"up"`` to the output
    of the up projection, as in the LongAlign authors' code.
    """
    targets: Annotated[list[str], Field(min_length=1)] | str | None = None
    """layers with a LoRA: a list of names or ends of names (``[to_q, to_k, ff.net.2]``), or a regular expression that
    the whole name must match. null: all layers inside attention, and in UNets also inside ResnetBlock2D and GEGLU.
    """

    @field_validator("targets")
    @classmethod
    def _compiles(cls, targets: list[str] | str | None) -> list[str] | str | None:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(
                    f"expected a list of names or a regular expression, got {targets!r}: {error}"
                ) from None
        return targets


class BackboneConfig(PartConfig):
    """Base class of backbone configs."""

    #: whether the denoiser takes a pooled embedding of the prompt; None if unknown
    has_pooled: ClassVar[bool | None] = None
    #: folder of the denoiser in a checkpoint in diffusers layout, and its prefix in LoRA files
    component: ClassVar[str] = "unet"

    @property
    def divisor(self) -> int | None:
        """Number of pixels that image height and width must be divisible by; None if unknown."""
        return None

    def resolution(self) -> int | None:
        """Native width and height of an image in pixels, found without loading weights; None if unknown."""
        return None

    def widths(self) -> tuple[int | None, int | None]:
        """Returns the widths of the states and of the pooled embedding that the denoiser expects; None if unknown."""
        return None, None


class DiffusersConfig(BackboneConfig):
    """Base class of the configs of models in diffusers layout: folders of denoiser, VAE and scheduler."""

    checkpoint: str
    """Hub id, or local folder in diffusers layout."""
    subfolder: str | None = None
    """folder in the checkpoint that contains the denoiser, ``vae/`` and ``scheduler/``; null: the root folder."""
    revision: str | None = None
    """branch, tag or commit on the Hub."""
    variant: str | None = None
    """file variant, e.g. ``"fp16"`` for weights in ``*.fp16.safetensors``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the denoiser's weights; trainable weights are always float32. The VAE has the dtype of
    ``loop.precision``.
    """

    @property
    def single_file(self) -> bool:
        """Whether the checkpoint is one file instead of a folder or repository."""
        return False

    def config_of(self, folder: str) -> dict[str, Any]:
        """Returns the config of one network of the checkpoint, or an empty dict if it is not available locally."""
        return read_json(self.checkpoint, join_subfolder(self.subfolder, f"{folder}/config.json"), self.revision)

    def number_of(self, key: str) -> int | None:
        """Returns an integer of the denoiser's config, or None."""
        value = self.config_of(self.component).get(key)
        return value if isinstance(value, int) else None

    @property
    def divisor(self) -> int | None:
        """Number of pixels that image height and width must be divisible by.

        None if the VAE's config is not available locally.
        """
        blocks = self.config_of("vae").get("block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None

    def check_files(self) -> list[ConfigProblem]:
        if problem := availability_problem(self.checkpoint, self.revision):
            return [("checkpoint", problem)]
        files = [join_subfolder(self.subfolder, f"{folder}/config.json") for folder in (self.component, "vae")]
        missing = [problem for file in files if (problem := checkpoint_problem(self.checkpoint, [file], self.revision))]
        return (
            [("checkpoint", f"{missing[0]}, which '{self.name}' requires; check 'checkpoint' and 'subfolder'")]
            if missing
            else []
        )


class TransformerConfig(DiffusersConfig):
    """Base class of the configs of transformers in diffusers layout."""

    component: ClassVar[str] = "transformer"

    def check_run(self, run: Any) -> list[ConfigProblem]:
        if not run.loop.channels_last:
            return []
        problem = f"channels_last requires convolutions, but '{self.name}' is a transformer; set it to false"
        return [("loop.channels_last", problem)]
