"""Configs of the Stable Diffusion family. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from longalign.backbones.config import DiffusersConfig, TransformerConfig
from longalign.errors import ConfigProblem
from longalign.files.paths import check_single_file
from longalign.hub import availability_problem, read_json


class StableDiffusionConfig(DiffusersConfig):
    """Base class of the configs of Stable Diffusion models."""

    checkpoint: str
    """Hub id, local folder in diffusers layout, ``mini/sd`` (bundled weights of a small model), or a single
    ``.safetensors`` file. A single file contains the weights of UNet and VAE, with their names in the original code
    instead of diffusers' names.
    """
    layout: str | None = None
    """for a single-file checkpoint, Hub id or folder in diffusers layout of a model with the same architecture. Only
    the configs of that model are read. null: the Hub's configs of Stable Diffusion 1.5 or XL, whichever fits the
    weights.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the UNet's weights; trainable weights are always float32. The key ``loop.precision`` sets the VAE's
    dtype.
    """

    @property
    def single_file(self) -> bool:
        """Whether the checkpoint is one file instead of a folder or repository."""
        return self.checkpoint.endswith(".safetensors")

    def resolution(self) -> int:
        """Returns the native width and height of a square image in pixels, from the configs of the networks."""
        return self.native_resolution(self.layout)

    @model_validator(mode="after")
    def _check_single_file(self) -> StableDiffusionConfig:
        check_single_file(
            self.checkpoint, self.layout, subfolder=self.subfolder, revision=self.revision, variant=self.variant
        )
        return self

    def config_of(self, folder: str) -> dict[str, Any]:
        """Returns the config of one network, e.g. in the folder ``unet``; empty if it is not on this machine."""
        if not self.single_file:
            return super().config_of(folder)
        return read_json(self.layout, f"{folder}/config.json") if self.layout else {}

    def widths(self) -> tuple[int | None, int | None]:
        config = self.config_of(self.component)
        width = config.get("cross_attention_dim")
        return width if isinstance(width, int) and not config.get("encoder_hid_dim") else None, None

    def check_files(self) -> list[ConfigProblem]:
        if self.single_file:
            problems: list[ConfigProblem] = []
            if not Path(self.checkpoint).is_file():
                problems.append(
                    ("checkpoint", f"file {self.checkpoint} not found; expected the path of a local .safetensors file")
                )
            return problems + (
                [("layout", problem)] if self.layout and (problem := availability_problem(self.layout)) else []
            )
        return super().check_files()


class SDConfig(StableDiffusionConfig):
    """Stable Diffusion 1.x and 2.x, or any model with the same layout."""

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sd:SDBackbone"
    has_pooled: ClassVar[bool | None] = False

    name: Literal["sd"] = "sd"


class SDXLConfig(StableDiffusionConfig):
    """Stable Diffusion XL, or any model with the same layout.

    The UNet's size conditioning is always the size of the denoised image, without a crop. In training, this is the size
    of the image's bucket: the size to which images of similar aspect ratio are scaled and cropped.
    """

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sdxl:SDXLBackbone"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["sdxl"] = "sdxl"
    checkpoint: str
    """Hub id, e.g. ``stabilityai/stable-diffusion-xl-base-1.0``, local folder in diffusers layout, or a single
    ``.safetensors`` file. A single file contains the weights of UNet and VAE, with their names in the original code
    instead of diffusers' names.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the UNet's weights; trainable weights are always float32. The key ``loop.precision`` sets the VAE's
    dtype; a VAE whose config has ``force_upcast`` is float32 instead of float16, in which it would overflow.
    """

    def widths(self) -> tuple[int | None, int | None]:
        config = self.config_of(self.component)
        total, size = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
        return super().widths()[0], total - 6 * size if isinstance(total, int) and isinstance(size, int) else None


class SD3Config(TransformerConfig, StableDiffusionConfig):
    """Stable Diffusion 3 and 3.5, or any model with the same layout: a transformer trained with flow matching.

    By default, a LoRA is on the attention projections of text and image, as in diffusers' LoRA training of SD3.
    """

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sd3:SD3Backbone"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["sd3"] = "sd3"
    checkpoint: str
    """Hub id, e.g. ``stabilityai/stable-diffusion-3-medium-diffusers``, or local folder in diffusers layout."""
    layout: str | None = None
    """for a single-file checkpoint, Hub id or folder in diffusers layout of a model with the same architecture. Only
    the configs of that model are read. Loading single files of Stable Diffusion 3 has not been tested.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the transformer's weights; trainable weights are always float32. The key ``loop.precision`` sets the
    VAE's dtype.
    """

    @property
    def divisor(self) -> int | None:
        patch, factor = self.number_of("patch_size"), super().divisor
        return factor * patch if factor is not None and patch is not None else None

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("joint_attention_dim"), self.number_of("pooled_projection_dim")
