"""Configs of the Stable Diffusion family; importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from longalign.backbones.config import BackboneConfig
from longalign.config.files import check_single_file, join_subfolder
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, missing_files_problem, read_json


class StableDiffusionConfig(BackboneConfig):
    """Checkpoints of the Stable Diffusion family."""

    checkpoint: str
    """Hub id, local folder in diffusers layout, ``mini/sd``, or a single ``.safetensors`` file. A single file contains
    the weights of UNet and VAE under the names of the original code.
    """
    layout: str | None = None
    """for a single file, Hub id or folder in diffusers layout of a model of the same architecture; only its configs are
    read. null uses the Hub's configs for Stable Diffusion 1.5 and XL.
    """
    subfolder: str | None = None
    """folder in the checkpoint that contains ``unet/``, ``vae/`` and so on; null for its root."""
    revision: str | None = None
    """branch, tag or commit on the Hub."""
    variant: str | None = None
    """file variant, e.g. ``"fp16"`` for weights in ``*.fp16.safetensors``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the UNet's weights; trainable weights are always float32. The VAE has the runtime's dtype."""

    @property
    def single_file(self) -> bool:
        """Whether the checkpoint is one file instead of a folder or repository."""
        return self.checkpoint.endswith((".safetensors", ".ckpt"))

    def resolution(self) -> int:
        """Native width and height of an image in pixels, read from the checkpoint's configs without its weights."""
        from longalign.backbones.stable_diffusion.loading import native_resolution

        return native_resolution(self)

    @model_validator(mode="after")
    def _check_single_file(self) -> StableDiffusionConfig:
        check_single_file(
            self.checkpoint, self.layout, subfolder=self.subfolder, revision=self.revision, variant=self.variant
        )
        return self

    def _config_of(self, folder: str) -> dict[str, Any]:
        """Config of one network of the checkpoint; empty if it is not on this machine."""
        checkpoint = self.layout or "" if self.single_file else self.checkpoint
        return (
            read_json(checkpoint, join_subfolder(self.subfolder, f"{folder}/config.json"), self.revision)
            if checkpoint
            else {}
        )

    @property
    def divisor(self) -> int | None:
        """Divisor of an image's height and width in pixels; None if the VAE's config is not on this machine."""
        blocks = self._config_of("vae").get("block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None

    def widths(self) -> tuple[int | None, int | None]:
        config = self._config_of(self.component)
        width = config.get("cross_attention_dim")
        return width if isinstance(width, int) and not config.get("encoder_hid_dim") else None, None

    def check_files(self) -> list[ConfigProblem]:
        if self.single_file:
            problems: list[ConfigProblem] = []
            if not Path(self.checkpoint).is_file():
                problems.append(("checkpoint", f"no file {self.checkpoint}; a single file must be on this machine"))
            return problems + (
                [("layout", problem)] if self.layout and (problem := availability_problem(self.layout)) else []
            )
        if problem := availability_problem(self.checkpoint, self.revision):
            return [("checkpoint", problem)]
        files = [join_subfolder(self.subfolder, f"{folder}/config.json") for folder in (self.component, "vae")]
        missing = [
            problem for file in files if (problem := missing_files_problem(self.checkpoint, [file], self.revision))
        ]
        return [("checkpoint", f"{missing[0]}, as '{self.name}' needs; see 'subfolder'")] if missing else []


class SDConfig(StableDiffusionConfig):
    """Stable Diffusion 1.x and 2.x, or any model of that layout."""

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sd:SDBackbone"
    has_pooled: ClassVar[bool | None] = False

    name: Literal["sd"] = "sd"


class SDXLConfig(StableDiffusionConfig):
    """Stable Diffusion XL, or any model of that layout. The size conditioning is fixed to the true size without
    a crop.
    """

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sdxl:SDXLBackbone"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["sdxl"] = "sdxl"
    checkpoint: str
    """Hub id, e.g. ``stabilityai/stable-diffusion-xl-base-1.0``, local folder in diffusers layout, or a single
    ``.safetensors`` file with the weights of UNet and VAE under the names of the original code.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the UNet's weights; trainable weights are always float32. The VAE has the runtime's dtype, but float32
    instead of float16, in which it overflows.
    """

    def widths(self) -> tuple[int | None, int | None]:
        config = self._config_of(self.component)
        total, size = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
        return super().widths()[0], total - 6 * size if isinstance(total, int) and isinstance(size, int) else None


class SD3Config(StableDiffusionConfig):
    """Stable Diffusion 3 and 3.5, or any model of that layout: a transformer that predicts a flow.

    A LoRA is added to the attention projections of text and image, as in diffusers' LoRA training of SD3.
    """

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sd3:SD3Backbone"
    component: ClassVar[str] = "transformer"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["sd3"] = "sd3"
    checkpoint: str
    """Hub id, e.g. ``stabilityai/stable-diffusion-3-medium-diffusers``, or local folder in diffusers layout."""
    layout: str | None = None
    """for a single file, as for ``sd``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the transformer's weights; trainable weights are always float32. The VAE has the runtime's dtype."""

    @property
    def divisor(self) -> int | None:
        patch = self._config_of(self.component).get("patch_size")
        factor = super().divisor
        return factor * patch if factor is not None and isinstance(patch, int) else None

    def widths(self) -> tuple[int | None, int | None]:
        config = self._config_of(self.component)
        states, pooled = config.get("joint_attention_dim"), config.get("pooled_projection_dim")
        return states if isinstance(states, int) else None, pooled if isinstance(pooled, int) else None

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        if not run.loop.channels_last:
            return []
        return [("loop.channels_last", "channels_last needs convolutions, and 'sd3' is a transformer; set it to false")]
