"""Configs of backbones and of LoRA; importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.backbones.config import BackboneConfig
from longalign.config.files import check_single_file, join_subfolder
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, missing_files_problem, read_json
from longalign.registry import Section
from longalign.runtime import Runtime


class LoraConfig(Section):
    """Low-rank updates of every Linear and Conv2d inside ResnetBlock2D, Attention and GEGLU (arXiv 2106.09685).

    ``down`` is initialised from N(0, 1/rank^2) and ``up`` with zeros, so the update is zero at the start.

    Attributes:
        rank: width of the bottleneck.
        scale: factor of the update.
        dropout: dropout probability in the update during training.
        dropout_placement: ``"down"`` drops inputs of the down projection, as in peft; ``"up"`` drops outputs of the up
            projection, as in the LongAlign authors' code.
    """

    rank: int = Field(default=32, ge=1)
    scale: float = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    dropout_placement: Literal["down", "up"] = "down"


class SDConfig(BackboneConfig):
    """Stable Diffusion 1.x and 2.x, or any model of that layout.

    Attributes:
        checkpoint: Hub id, local folder in diffusers layout, ``mini/sd``, or a single ``.safetensors`` file. A single
            file contains the weights of UNet and VAE under the names of the original code.
        layout: for a single file, Hub id or folder in diffusers layout of a model of the same architecture; only its
            configs are read. null uses the Hub's configs for Stable Diffusion 1.5 and XL.
        subfolder: folder in the checkpoint that contains ``unet/``, ``vae/`` and so on; null for its root.
        revision: branch, tag or commit on the Hub.
        variant: file variant, e.g. ``"fp16"`` for weights in ``*.fp16.safetensors``.
        dtype: dtype of the UNet's weights; trainable weights are always float32. The VAE has the runtime's dtype.
    """

    #: folder of the denoiser in a checkpoint, and its prefix in LoRA files
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
        """Native width and height of an image in pixels, read from the checkpoint's configs without its weights."""
        from longalign.backbones.latent import native_resolution

        return native_resolution(self)

    @model_validator(mode="after")
    def _check_single_file(self) -> SDConfig:
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

    def build(self, runtime: Runtime) -> Any:
        from longalign.backbones.sd import SDBackbone

        return SDBackbone.from_config(self, runtime)


class SDXLConfig(SDConfig):
    """Stable Diffusion XL, or any model of that layout. The size conditioning is fixed to the true size without a crop.

    Attributes:
        checkpoint: Hub id, e.g. ``stabilityai/stable-diffusion-xl-base-1.0``, local folder in diffusers layout, or a
            single ``.safetensors`` file with the weights of UNet and VAE under the names of the original code.
        dtype: dtype of the UNet's weights; trainable weights are always float32. The VAE has the runtime's dtype, but
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

    A LoRA is added to the attention projections of text and image, as in diffusers' LoRA training of SD3.

    Attributes:
        checkpoint: Hub id, e.g. ``stabilityai/stable-diffusion-3-medium-diffusers``, or local folder in diffusers
            layout.
        layout: for a single file, as for ``sd``.
        dtype: dtype of the transformer's weights; trainable weights are always float32. The VAE has the runtime's
            dtype.
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
        return [("loop.channels_last", "channels_last needs convolutions, and 'sd3' is a transformer; set it to false")]

    def build(self, runtime: Runtime) -> Any:
        from longalign.backbones.sd3 import SD3Backbone

        return SD3Backbone.from_config(self, runtime)
