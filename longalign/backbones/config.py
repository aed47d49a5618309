"""Base class of backbone configs, and the config of LoRAs. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from longalign.errors import ConfigProblem
from longalign.files.paths import join_subfolder
from longalign.hub import availability_problem, checkpoint_problem, read_json
from longalign.registry import PartConfig, Section


def vae_scale_factor(config: Mapping[str, Any]) -> int | None:
    """Returns the number of pixels per latent along each side of an image, from the VAE's config; None if unknown."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if blocks:
        return 2 ** (len(blocks) - 1)
    downsampling = config.get("temperal_downsample")  # of Qwen-Image, one for each halving of the width
    return 2 ** len(downsampling) if downsampling else None


class LoraConfig(Section):
    """Low-rank updates of the denoiser's Linear and Conv2d layers (arXiv 2106.09685).

    The update is ``scale * up @ down``. ``down`` is initialized with normally distributed numbers of mean 0 and
    standard deviation 1/rank, and ``up`` with zeros, so the update is zero at the start.
    """

    rank: int = Field(default=32, ge=1)
    """rank of the update."""
    scale: float = Field(default=1.0, gt=0)
    """factor of the update (``lora_alpha / r`` in peft)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """dropout probability of the update during training (``lora_dropout`` in peft)."""
    dropout_placement: Literal["down", "up"] = "down"
    """where dropout is applied: ``"down"`` to the input of the down projection, as in peft, or ``"up"`` to the output
    of the up projection, as in the LongAlign authors' code.
    """
    targets: Annotated[list[str], Field(min_length=1)] | str | None = None
    """layers with a LoRA: a list of names or ends of names (``[to_q, to_k, ff.net.2]``), or a regular expression that
    the whole name must match. null: all layers inside attention, and in UNets also inside ResnetBlock2D and GEGLU.
    Layers that cannot change the prediction get no LoRA.
    """

    @field_validator("targets")
    @classmethod
    def _compiles(cls, targets: list[str] | str | None) -> list[str] | str | None:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(
                    f"expected a list of names or a regular expression, got {targets!r}: {error}; correct it"
                ) from None
        return targets


class BackboneConfig(PartConfig):
    """Base class of the configs of backbones: denoisers in a latent space, with their autoencoders."""

    #: whether the denoiser takes a pooled embedding of the prompt; None if unknown
    has_pooled: ClassVar[bool | None] = None
    #: folder of the denoiser in a checkpoint in diffusers layout, and prefix of its weights' names in LoRA files
    component: ClassVar[str] = "unet"

    @property
    def divisor(self) -> int | None:
        """Number of pixels that image height and width must be divisible by; None if unknown."""
        return None

    def resolution(self) -> int | None:
        """Returns the native width and height of a square image in pixels, without loading weights; None if unknown."""
        return None

    def widths(self) -> tuple[int | None, int | None]:
        """Returns the widths that the denoiser expects of the text's hidden states and of its pooled embedding.

        A width is None if it is unknown, or if the denoiser takes no pooled embedding.
        """
        return None, None


class DiffusersConfig(BackboneConfig):
    """Base class of the configs of models in diffusers layout: folders of denoiser, VAE and scheduler."""

    checkpoint: str
    """Hub id, or local folder in diffusers layout."""
    subfolder: str | None = None
    """folder in the checkpoint that contains the denoiser, ``vae/`` and ``scheduler/``; null: the root folder."""
    revision: str | None = None
    """branch, tag or commit on the Hub; null: the default branch."""
    variant: str | None = None
    """variant of the weight files, e.g. ``"fp16"`` for ``*.fp16.safetensors``; null: files without a variant."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the denoiser's weights; trainable weights are always float32. The key ``loop.precision`` sets the VAE's
    dtype.
    """

    @property
    def single_file(self) -> bool:
        """Whether the checkpoint is one file instead of a folder or repository."""
        return False

    def config_of(self, folder: str) -> dict[str, Any]:
        """Returns the config of one network, e.g. in the folder ``unet``; empty if it is not on this machine."""
        return read_json(self.checkpoint, join_subfolder(self.subfolder, f"{folder}/config.json"), self.revision)

    def number_of(self, key: str) -> int | None:
        """Returns the integer ``key`` of the denoiser's config; None if key or config is missing on this machine."""
        value = self.config_of(self.component).get(key)
        return value if isinstance(value, int) else None

    @property
    def divisor(self) -> int | None:
        """Number of pixels that image height and width must be divisible by.

        None if the configs of the networks are not on this machine.
        """
        return vae_scale_factor(self.config_of("vae"))

    def native_resolution(self, layout: str | None = None) -> int:
        """Returns the native width and height of a square image in pixels, from the configs of denoiser and VAE.

        The configs are downloaded if needed.

        Args:
            layout: for a single-file checkpoint, the folder or Hub id with its configs; None detects the Hub id.

        Raises:
            ValueError: if the checkpoint does not contain these configs.
        """
        from longalign.backbones.stable_diffusion.layout import network_configs

        place = {"layout": layout, "subfolder": self.subfolder, "revision": self.revision}
        denoiser, vae = network_configs(self.checkpoint, self.component, **place)
        return int(denoiser["sample_size"]) * (vae_scale_factor(vae) or 1)

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
    #: what keeps calls from being captured as CUDA graphs; empty if nothing does
    uncapturable: ClassVar[str] = ""

    def check_run(self, run: Any) -> list[ConfigProblem]:
        problems: list[ConfigProblem] = []
        if run.loop.channels_last:
            problem = f"channels_last requires convolutions, but '{self.name}' is a transformer; set it to false"
            problems.append(("loop.channels_last", problem))
        if run.loop.cuda_graphs and self.uncapturable:
            problem = f"the transformer of '{self.name}' {self.uncapturable}, which a graph cannot; set it to false"
            problems.append(("loop.cuda_graphs", problem))
        return problems


class ImageSizeConfig(TransformerConfig):
    """Base class of the configs of transformers whose checkpoints contain no image size, so that a config key sets it.

    An image token is a patch of 2 by 2 latents.
    """

    image_size: int = Field(default=1024, ge=16)
    """width and height in pixels of the square images that the model was trained for; the checkpoint does not contain
    it.
    """

    def resolution(self) -> int:
        """Returns the native width and height of a square image in pixels."""
        return self.image_size

    @property
    def divisor(self) -> int | None:
        factor = super().divisor
        return None if factor is None else 2 * factor


class SampleSizeConfig(TransformerConfig):
    """Base class of the configs of transformers whose checkpoints contain the sizes of latents and patches."""

    def resolution(self) -> int:
        """Returns the native width and height of a square image in pixels, from the checkpoint's configs only."""
        return self.native_resolution()

    @property
    def divisor(self) -> int | None:
        patch, factor = self.number_of("patch_size"), super().divisor
        return factor * patch if factor is not None and patch is not None else None
