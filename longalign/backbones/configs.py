"""Configs of backbones and of the LoRA that is trained on them; no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.errors import ConfigProblem
from longalign.files import check_single_file, join_subfolder
from longalign.hub import absent, incomplete, read_json
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
    #: whether the denoiser takes a pooled embedding of the prompt
    has_pooled: ClassVar[bool] = False

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

    def _config_of(self, folder: str) -> dict[str, Any]:
        """The config of a network of the checkpoint, as far as it is on this machine."""
        checkpoint = self.layout or "" if self.single_file else self.checkpoint
        return (
            read_json(checkpoint, join_subfolder(self.subfolder, f"{folder}/config.json"), self.revision)
            if checkpoint
            else {}
        )

    @property
    def divisor(self) -> int | None:
        """What an image's height and width must be divisible by; None if no file on this machine tells."""
        blocks = self._config_of("vae").get("block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None

    def widths(self) -> tuple[int | None, int | None]:
        config = self._config_of(self.component)
        width = config.get("cross_attention_dim")
        return width if isinstance(width, int) and not config.get("encoder_hid_dim") else None, None

    def check_files(self) -> list[ConfigProblem]:
        if self.single_file:
            there = Path(self.checkpoint).is_file()
            problems = (
                [] if there else [("checkpoint", f"no file {self.checkpoint}; a single file must be on this machine")]
            )
            return problems + ([("layout", problem)] if self.layout and (problem := absent(self.layout)) else [])
        if problem := absent(self.checkpoint, self.revision):
            return [("checkpoint", problem)]
        wanted = [join_subfolder(self.subfolder, f"{folder}/config.json") for folder in (self.component, "vae")]
        lacking = [problem for file in wanted if (problem := incomplete(self.checkpoint, [file], self.revision))]
        return [("checkpoint", f"{lacking[0]}, as '{self.name}' needs; see 'subfolder'")] if lacking else []

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

    has_pooled: ClassVar[bool] = True

    name: Literal["sdxl"] = "sdxl"  # pyright: ignore[reportIncompatibleVariableOverride]

    def widths(self) -> tuple[int | None, int | None]:
        config = self._config_of(self.component)
        total, size = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
        return super().widths()[0], total - 6 * size if isinstance(total, int) and isinstance(size, int) else None

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
    has_pooled: ClassVar[bool] = True

    name: Literal["sd3"] = "sd3"  # pyright: ignore[reportIncompatibleVariableOverride]

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
        return [("loop.channels_last", "it is a layout of convolutions, and 'sd3' is a transformer; set it to false")]

    def build(self, runtime: Runtime) -> Any:
        from longalign.backbones.sd3 import SD3Backbone

        return SD3Backbone.from_config(self, runtime)
