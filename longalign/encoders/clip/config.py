"""Configs of the encoders with CLIP text models; no torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from longalign.config.files import check_single_file, join_subfolder
from longalign.encoders.config import CheckpointConfig, LoadedConfig
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem
from longalign.registry import Part
from longalign.segmenters import SentenceConfig


class SingleFileConfig(CheckpointConfig):
    """Shared by encoders that can also read a CLIP from a single-file checkpoint."""

    #: keys that select files of a folder or repository
    selection_keys: ClassVar[tuple[str, ...]] = ("revision", "variant")

    layout: str | None = None
    """for a single ``.safetensors`` checkpoint with the weight names of the original code: Hub id or folder in
    diffusers layout of a model of the same architecture. Its text-model configs and tokenizers are used; null takes
    those of Stable Diffusion 1.5, 2.1 or XL from the Hub.
    """

    @model_validator(mode="after")
    def _agree(self) -> SingleFileConfig:
        check_single_file(self.checkpoint, self.layout, **{key: getattr(self, key) for key in self.selection_keys})
        return self


class SegmentConfig(CheckpointConfig):
    """Shared by encoders that encode the segments of a prompt separately and merge their states."""

    segmenter: Part("segmenters") = SentenceConfig()  # type: ignore[valid-type]
    """how prompts are split."""
    sot: Literal["all", "first", "none"] = "all"
    """which segments keep their ``<sot>``."""
    eot: Literal["none", "all", "last"] = "none"
    """which segments keep their ``<eot>``."""
    pad: Literal["pad*", "pad", "none"] = "pad*"
    """how states are padded to ``max_tokens``: the mean padding state ``<pad*>`` ("pad*"), the empty prompt's states
    ("pad"), or not at all, with a mask ("none").
    """
    max_tokens: int = Field(default=240, ge=1)
    """number of merged states; shorter prompts are padded to it."""
    overflow: Literal["grow", "truncate", "error"] = "grow"
    """for a longer prompt, "grow" the batch to its length, "truncate" it with a warning, as in the published models, or
    raise an "error".
    """


class ClipSegmentConfig(SegmentConfig, LoadedConfig, SingleFileConfig):
    """Segment-level encoding with CLIP."""

    target: ClassVar[str] = "longalign.encoders.clip.segment:ClipSegmentEncoder"

    name: Literal["clip-segment"] = "clip-segment"
    checkpoint: str = Field(default="stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)


class TwoClipsConfig(SegmentConfig):
    """Shared by segment encoders with two CLIPs."""

    has_pooled: ClassVar[bool | None] = True

    subfolder: str | None = None
    """subfolder of the checkpoint that contains these folders; null for the top level."""
    pooled: Literal["mean", "first", "truncate"] = "mean"
    """the pooled embedding: the "mean" over the segments, the "first" segment's, or "truncate": that of the prompt
    truncated to 77 tokens. They are equal for a prompt of one segment.
    """
    checkpoint: str = Field(min_length=1)
    """Hub id or local folder in diffusers layout: ``text_encoder/``, ``text_encoder_2/``, tokenizers."""

    def _configs(self) -> list[str]:
        return [join_subfolder(self.subfolder, "text_encoder/config.json")]

    def _from_both_configs(self, key: str) -> tuple[int | None, int | None]:
        """Returns a key of the configs of both CLIPs."""
        first, second = (
            self._width_of(key, folder=join_subfolder(self.subfolder, f"text_encoder{n}")) for n in ("", "_2")
        )
        return first, second


class ClipSegmentSDXLConfig(TwoClipsConfig, SingleFileConfig):
    """Segment-level encoding with the two CLIPs of Stable Diffusion XL."""

    target: ClassVar[str] = "longalign.encoders.clip.sdxl:ClipSegmentSDXLEncoder"

    selection_keys: ClassVar[tuple[str, ...]] = ("subfolder", "revision", "variant")

    name: Literal["clip-segment-sdxl"] = "clip-segment-sdxl"
    checkpoint: str = Field(default="stabilityai/stable-diffusion-xl-base-1.0", min_length=1)
    empty: Literal["zeros", "encode"] = "zeros"
    """the empty prompt is encoded as "zeros", as in the SDXL pipeline, or "encode": like any other."""

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._from_both_configs("hidden_size")
        return first + second if first and second else None, self._from_both_configs("projection_dim")[1]


class ClipSegmentSD3Config(TwoClipsConfig):
    """Segment-level encoding with the two CLIPs of Stable Diffusion 3, followed by T5 over the whole prompt."""

    target: ClassVar[str] = "longalign.encoders.clip.sd3:ClipSegmentSD3Encoder"

    name: Literal["clip-segment-sd3"] = "clip-segment-sd3"
    checkpoint: str = Field(default="stabilityai/stable-diffusion-3-medium-diffusers", min_length=1)
    t5: Literal["encode", "zeros", "none"] = "encode"
    """"encode" with ``text_encoder_3``; "zeros": zero states instead, as in the diffusers pipeline without T5; or
    "none": no T5 states, so that `concat` can append a T5 with different settings.
    """
    t5_tokens: int = Field(default=256, ge=1)
    """number of T5 states, to which shorter prompts are padded, or of zero states. ``overflow`` also applies to T5."""
    width: int = Field(default=4096, ge=1)
    """width of the states that the transformer expects; CLIP's states are zero-padded to it."""

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._from_both_configs("projection_dim")
        return self.width, first + second if first and second else None


class ClipTruncateConfig(LoadedConfig, SingleFileConfig):
    """CLIP over the whole prompt, truncated to 77 tokens, as in Stable Diffusion."""

    target: ClassVar[str] = "longalign.encoders.clip.truncate:ClipTruncateEncoder"

    name: Literal["clip-truncate"] = "clip-truncate"
    checkpoint: str = Field(default="stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)
    overflow: Literal["truncate", "error", "grow"] = "truncate"
    """for a longer prompt, "truncate" it with a warning, raise an "error", or "grow": encode it in windows of whole
    sentences and extend the batch to their states.
    """


class LongClipConfig(LoadedConfig):
    """LongCLIP over the whole prompt, in one or more passes of 248 tokens."""

    target: ClassVar[str] = "longalign.encoders.clip.longclip:LongClipEncoder"

    name: Literal["longclip"] = "longclip"
    checkpoint: str = Field(default="BeichenZhang/LongCLIP-L", min_length=1)
    """a Hub id or local folder, an original ``.pt`` file, or a repository that contains one."""
    filename: str | None = None
    """the original file in a folder or repository; None takes ``longclip-L.pt`` if it exists, else transformers' files.
    Transformers' files are also used if ``subfolder`` or ``variant`` is set.
    """
    tokenizer: str | None = None
    """Hub id or folder of CLIP's tokenizer; None takes the checkpoint's, or CLIP-L's if it has none."""
    overflow: Literal["grow", "truncate", "error"] = "grow"
    """for a longer prompt, "grow": encode it in windows of whole sentences and extend the batch to their states,
    "truncate" it with a warning, or raise an "error".
    """

    def check_files(self) -> list[ConfigProblem]:
        problem = self.tokenizer and availability_problem(self.tokenizer)
        return super().check_files() + ([("tokenizer", problem)] if problem else [])

    def _configs(self) -> list[str]:
        return [self.filename] if self.filename else ["longclip-L.pt", *super()._configs()]

    @model_validator(mode="after")
    def _one_file(self) -> LongClipConfig:
        single = self.checkpoint.endswith((".pt", ".safetensors"))
        others = ("filename", "subfolder", "revision", "variant") if single else ("subfolder", "variant")
        conflicts = [f"'{key}'" for key in others if getattr(self, key) is not None]
        if conflicts and (single or self.filename is not None):
            file = self.checkpoint if single else self.filename
            raise ValueError(f"{' and '.join(conflicts)} cannot be combined with the original file '{file}'; remove it")
        return self
