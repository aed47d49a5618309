"""Configs of the Stable Diffusion family. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from longalign.backbones.config import BackboneConfig
from longalign.config.files import check_single_file, join_subfolder
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, checkpoint_problem, read_json


class StableDiffusionConfig(BackboneConfig):
    """Base class of the configs of Stable Diffusion models."""

    checkpoint: str
    """Hub id, local folder in diffusers layout, ``mini/sd``, or a single ``.safetensors`` file. A single file contains
    the weights of UNet and VAE under the names of the original code.
    """
    layout: str | None = None
    """Hub id or folder in diffusers layout of a model with the architecture of a single-file checkpoint. Only the
    configs of that model are read. null: the Hub's configs of Stable Diffusion 1.5 or XL.
    """
    subfolder: str | None = None
    """folder in the checkpoint that contains the denoiser, ``vae/`` and ``scheduler/``; null: the root folder."""
    revision: str | None = None
    """branch, tag or commit on the Hub."""
    variant: str | None = None
    """file variant, e.g. ``"fp16"`` for weights in ``*.fp16.safetensors``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the UNet's weights; trainable weights are always float32. The VAE uses the dtype of
    ``loop.precision``.
    """

    @property
    def single_file(self) -> bool:
        """Whether the checkpoint is one file instead of a folder or repository."""
        return self.checkpoint.endswith(".safetensors")

    def resolution(self) -> int:
        """Native width and height of an image in pixels, read from the checkpoint's configs without its weights."""
        from longalign.backbones.stable_diffusion.layout import native_resolution

        place = {"layout": self.layout, "subfolder": self.subfolder, "revision": self.revision}
        return native_resolution(self.checkpoint, self.component, **place)

    @model_validator(mode="after")
    def _check_single_file(self) -> StableDiffusionConfig:
        check_single_file(
            self.checkpoint, self.layout, subfolder=self.subfolder, revision=self.revision, variant=self.variant
        )
        return self

    def _config_of(self, folder: str) -> dict[str, Any]:
        """Returns the config of one network of the checkpoint, or an empty dict if it is not available locally."""
        checkpoint = self.layout or "" if self.single_file else self.checkpoint
        return (
            read_json(checkpoint, join_subfolder(self.subfolder, f"{folder}/config.json"), self.revision)
            if checkpoint
            else {}
        )

    @property
    def divisor(self) -> int | None:
        """Number of pixels that image height and width must be divisible by.

        None if the VAE's config is not available locally.
        """
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
                problems.append(
                    ("checkpoint", f"file {self.checkpoint} not found; expected the path of a local .safetensors file")
                )
            return problems + (
                [("layout", problem)] if self.layout and (problem := availability_problem(self.layout)) else []
            )
        if problem := availability_problem(self.checkpoint, self.revision):
            return [("checkpoint", problem)]
        files = [join_subfolder(self.subfolder, f"{folder}/config.json") for folder in (self.component, "vae")]
        missing = [problem for file in files if (problem := checkpoint_problem(self.checkpoint, [file], self.revision))]
        return (
            [("checkpoint", f"{missing[0]}, which '{self.name}' requires; check 'checkpoint' and 'subfolder'")]
            if missing
            else []
        )


class SDConfig(StableDiffusionConfig):
    """Stable Diffusion 1.x and 2.x, or any model with the same layout."""

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sd:SDBackbone"
    has_pooled: ClassVar[bool | None] = False

    name: Literal["sd"] = "sd"


class SDXLConfig(StableDiffusionConfig):
    """Stable Diffusion XL, or any model with the same layout.

    The UNet's size conditioning is always the true image size without a crop.
    """

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sdxl:SDXLBackbone"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["sdxl"] = "sdxl"
    checkpoint: str
    """Hub id, e.g. ``stabilityai/stable-diffusion-xl-base-1.0``, local folder in diffusers layout, or a single
    ``.safetensors`` file with the weights of UNet and VAE under the names of the original code.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the UNet's weights; trainable weights are always float32. The VAE has the dtype of ``loop.precision``,
    except that float32 replaces float16, in which a VAE with ``force_upcast`` overflows.
    """

    def widths(self) -> tuple[int | None, int | None]:
        config = self._config_of(self.component)
        total, size = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
        return super().widths()[0], total - 6 * size if isinstance(total, int) and isinstance(size, int) else None


class SD3Config(StableDiffusionConfig):
    """Stable Diffusion 3 and 3.5, or any model with the same layout: a transformer trained with flow matching.

    A LoRA is added to the transformer's text and image attention projections, as in diffusers' LoRA training of SD3.
    """

    target: ClassVar[str] = "longalign.backbones.stable_diffusion.sd3:SD3Backbone"
    component: ClassVar[str] = "transformer"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["sd3"] = "sd3"
    checkpoint: str
    """Hub id, e.g. ``stabilityai/stable-diffusion-3-medium-diffusers``, or local folder in diffusers layout."""
    layout: str | None = None
    """Hub id or folder in diffusers layout with the configs of a single-file checkpoint, as for ``sd``. Loading single
    files of Stable Diffusion 3 has not been tested.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the transformer's weights; trainable weights are always float32. The VAE has the dtype of
    ``loop.precision``.
    """

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
        return [
            ("loop.channels_last", "channels_last requires convolutions, but 'sd3' is a transformer; set it to false")
        ]
