"""Configs of backbones and of the LoRA that is trained on them; no torch here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.files import check_single_file
from longalign.registry import PartConfig, Section
from longalign.runtime import Runtime


class LoraConfig(Section):
    """Low-rank updates of every Linear and Conv2d inside ResnetBlock2D, Attention and GEGLU (arXiv 2106.09685).

    ``down`` starts as N(0, 1/rank^2) and ``up`` as zero, so training starts at the model itself.

    Attributes:
        rank: width of the bottleneck.
        scale: factor of the update.
        dropout: probability of dropout in the update while training.
        dropout_placement: ``"down"`` drops inputs before the down projection, as peft does; ``"up"`` drops outputs of
            the up projection, as the authors of LongAlign did.
    """

    rank: int = Field(default=32, ge=1)
    scale: float = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    dropout_placement: Literal["down", "up"] = "down"


class SDConfig(PartConfig):
    """Stable Diffusion 1.x and 2.x, or any model of that layout.

    Attributes:
        checkpoint: hub id, local folder in diffusers layout, ``mini/sd``, or a single ``.safetensors`` file with the
            weights of UNet and VAE under the names of the original code.
        layout: for a single file, hub id or folder in diffusers layout of a model of the same architecture, of which
            only the configs are read; null takes the hub's for Stable Diffusion 1.5 and XL.
        subfolder: where in a repository or folder those of diffusers' layout (``unet/``, ``vae/``...) are; null if
            they are at its top.
        revision: branch, tag or commit on the hub.
        variant: file variant, e.g. ``"fp16"`` for weights in ``*.fp16.safetensors``.
        dtype: of the UNet's weights; what is trained is float32 in any case. The VAE takes the runtime's dtype.
    """

    #: the denoiser's folder in a checkpoint, and its prefix in LoRA files
    component: ClassVar[str] = "unet"

    name: Literal["sd"] = "sd"
    checkpoint: str
    layout: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def single_file(self) -> bool:
        """Whether the checkpoint is one file instead of a folder or repository."""
        return self.checkpoint.endswith((".safetensors", ".ckpt"))

    def resolution(self) -> int:
        """Native width and height of an image in pixels, from the checkpoint's configs; weights are not loaded."""
        from longalign.backbones.latent import native_resolution

        return native_resolution(self)

    @model_validator(mode="after")
    def _agree(self) -> SDConfig:
        check_single_file(
            self.checkpoint, self.layout, subfolder=self.subfolder, revision=self.revision, variant=self.variant
        )
        return self

    def build(self, runtime: Runtime) -> Any:
        from longalign.backbones.sd import SDBackbone

        return SDBackbone.from_config(self, runtime)


class SDXLConfig(SDConfig):
    """Stable Diffusion XL, or any model of that layout. Images are told to be uncropped and of their own size.

    Attributes:
        checkpoint: hub id, e.g. ``stabilityai/stable-diffusion-xl-base-1.0``, local folder in diffusers layout, or a
            single ``.safetensors`` file with the weights of UNet and VAE under the names of the original code.
        dtype: of the UNet's weights; what is trained is float32 in any case. The VAE takes the runtime's dtype, but
            float32 instead of float16, in which it overflows.
    """

    name: Literal["sdxl"] = "sdxl"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, runtime: Runtime) -> Any:
        from longalign.backbones.sdxl import SDXLBackbone

        return SDXLBackbone.from_config(self, runtime)


class SD3Config(SDConfig):
    """Stable Diffusion 3 and 3.5, or any model of that layout: a transformer that predicts a flow.

    A LoRA goes on the attention's projections, of text and image, as in diffusers' LoRA training of SD3.

    Attributes:
        checkpoint: hub id, e.g. ``stabilityai/stable-diffusion-3-medium-diffusers``, or local folder in diffusers
            layout.
        layout: for a single file, as for ``sd``.
        dtype: of the transformer's weights; what is trained is float32 in any case. The VAE takes the runtime's dtype.
    """

    component: ClassVar[str] = "transformer"

    name: Literal["sd3"] = "sd3"  # pyright: ignore[reportIncompatibleVariableOverride]

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        if not run.loop.channels_last:
            return []
        return [("loop.channels_last", "it is a layout of convolutions, and 'sd3' is a transformer; set it to false")]

    def build(self, runtime: Runtime) -> Any:
        from longalign.backbones.sd3 import SD3Backbone

        return SD3Backbone.from_config(self, runtime)
