"""Configs of the encoders with CLIP text models. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from longalign.encoders.config import CheckpointConfig, LoadedConfig
from longalign.errors import ConfigProblem
from longalign.files.paths import check_single_file, join_subfolder
from longalign.hub import availability_problem
from longalign.registry import Part
from longalign.segmenters import SentenceConfig


class SingleFileConfig(CheckpointConfig):
    """Base class of the configs of encoders that can also load CLIP from a single-file checkpoint."""

    #: keys that select files of a folder or repository
    selection_keys: ClassVar[tuple[str, ...]] = ("revision", "variant")

    layout: str | None = None
    """for a ``checkpoint`` that is a single ``.safetensors`` file: Hub id or folder in diffusers layout of a model with
    the same architecture, whose text-model configs and tokenizers are used. null: Stable Diffusion 1.5, 2.1 or XL from
    the Hub, whichever has the file's weight names.
    """

    @model_validator(mode="after")
    def _agree(self) -> SingleFileConfig:
        check_single_file(self.checkpoint, self.layout, **{key: getattr(self, key) for key in self.selection_keys})
        return self


class SegmentConfig(CheckpointConfig):
    """Base class of the configs of encoders that split a prompt into segments (short texts, such as sentences).

    Each segment is encoded separately, and the states are concatenated.
    """

    segmenter: Part("segmenters") = SentenceConfig()  # type: ignore[valid-type]
    """how a prompt is split into segments, which CLIP encodes separately."""
    sot: Literal["all", "first", "none"] = "all"
    """which segments keep the state of their start token, ``<sot>``."""
    eot: Literal["none", "all", "last"] = "none"
    """which segments keep the state of their end token, ``<eot>``."""
    context: int = Field(default=0, ge=0)
    """number of preceding segments that are encoded together with each segment, as far as they fit CLIP's window of 77
    tokens. The states of the preceding segments are dropped. Helps if sentences refer to earlier ones ("It is red.");
    1 doubles the cost of encoding.
    """
    pad: Literal["pad*", "pad", "none"] = "pad*"
    """how the states of a prompt are padded to ``max_tokens``: ``"pad*"`` repeats one vector, the mean of the last 60
    of the 77 states of the empty prompt; ``"pad"`` uses the state of the empty prompt at the same position. ``"none"``
    pads only to the longest prompt of the batch and masks the padding.
    """
    max_tokens: int = Field(default=240, ge=1)
    """number of states to which shorter prompts are padded: one state per token, counted over all segments. For longer
    prompts see ``overflow``.
    """
    overflow: Literal["grow", "truncate", "error"] = "grow"
    """what to do with prompts of more than ``max_tokens`` states: ``"grow"`` pads the batch to the longest prompt,
    ``"truncate"`` truncates with a warning, as in the published models, ``"error"`` raises.
    """
    truncate_segments: bool = False
    """whether a segment longer than CLIP's window (75 tokens, ``<sot>`` and ``<eot>``) is truncated, with a warning.
    The published models do so, as does a tokenizer with ``truncation=True, max_length=77``. false: such a segment is
    split into segments that fit.
    """

    @model_validator(mode="after")
    def _check_truncation(self) -> SegmentConfig:
        if self.truncate_segments and self.overflow == "error":
            raise ValueError(
                "`overflow: error` rejects truncated prompts, but `truncate_segments: true` truncates segments; set "
                "overflow to 'grow' or 'truncate', or remove truncate_segments"
            )
        return self


class ClipSegmentConfig(SegmentConfig, LoadedConfig, SingleFileConfig):
    """Encodes each segment of a prompt, by default each sentence, separately with CLIP and concatenates the states."""

    target: ClassVar[str] = "longalign.encoders.clip.segment:ClipSegmentEncoder"

    name: Literal["clip-segment"] = "clip-segment"
    checkpoint: str = Field(default="stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)


class TwoClipsConfig(SegmentConfig):
    """Base class of the configs of segment encoders with two CLIPs."""

    has_pooled: ClassVar[bool | None] = True

    subfolder: str | None = None
    """subfolder of the checkpoint with the text encoders and tokenizers; null: the top level."""
    pooled: Literal["mean", "first", "truncate"] = "mean"
    """which pooled embedding (one vector per prompt) is used: ``"mean"`` over the segments, that of the ``"first"``
    segment, or ``"truncate"``: that of the prompt truncated to 77 tokens. All three are equal for a prompt of one
    segment.
    """
    checkpoint: str = Field(min_length=1)
    """Hub id or local folder in diffusers layout: ``text_encoder/``, ``text_encoder_2/``, and their tokenizers."""

    def _configs(self) -> list[str]:
        return [join_subfolder(self.subfolder, "text_encoder/config.json")]

    def _from_both_configs(self, key: str) -> tuple[int | None, int | None]:
        """Returns the integer under ``key`` in the ``config.json`` of each CLIP; None where it is unknown."""
        first, second = (
            self._width_of(key, folder=join_subfolder(self.subfolder, f"text_encoder{n}")) for n in ("", "_2")
        )
        return first, second


class ClipSegmentSDXLConfig(TwoClipsConfig, SingleFileConfig):
    """Encodes each segment of a prompt, by default each sentence, separately with the two CLIPs of Stable Diffusion XL.

    The states of the segments are concatenated.
    """

    target: ClassVar[str] = "longalign.encoders.clip.sdxl:ClipSegmentSDXLEncoder"

    selection_keys: ClassVar[tuple[str, ...]] = ("subfolder", "revision", "variant")

    name: Literal["clip-segment-sdxl"] = "clip-segment-sdxl"
    checkpoint: str = Field(default="stabilityai/stable-diffusion-xl-base-1.0", min_length=1)
    empty: Literal["zeros", "encode"] = "zeros"
    """states and pooled embedding of the empty prompt: ``"zeros"``, as in diffusers' SDXL pipeline, or ``"encode"``, as
    for any other prompt.
    """

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._from_both_configs("hidden_size")
        return first + second if first and second else None, self._from_both_configs("projection_dim")[1]


class ClipSegmentSD3Config(TwoClipsConfig):
    """Encodes each segment of a prompt with the two CLIPs of Stable Diffusion 3, and the whole prompt with T5."""

    target: ClassVar[str] = "longalign.encoders.clip.sd3:ClipSegmentSD3Encoder"

    name: Literal["clip-segment-sd3"] = "clip-segment-sd3"
    checkpoint: str = Field(default="stabilityai/stable-diffusion-3-medium-diffusers", min_length=1)
    t5: Literal["encode", "zeros", "none"] = "encode"
    """source of the T5 states: ``"encode"`` runs ``text_encoder_3`` of the checkpoint; ``"zeros"`` uses zero states, as
    the diffusers pipeline does without T5. ``"none"`` adds no T5 states, so that the encoder `concat` can append a T5
    with other settings.
    """
    t5_tokens: int = Field(default=256, ge=1)
    """number of T5 states, one per token, to which shorter prompts are padded; for longer prompts see ``overflow``.
    With ``t5: zeros``, number of zero states.
    """
    width: int = Field(default=4096, ge=1)
    """width of the states that the denoiser expects: ``joint_attention_dim`` in diffusers. CLIP's states are padded
    with zeros to this width.
    """

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._from_both_configs("projection_dim")
        return self.width, first + second if first and second else None


class T5FluxConfig(CheckpointConfig):
    """Encodes the whole prompt with FLUX.1's T5, and adds a pooled embedding of CLIP.

    Long prompts are encoded in windows of whole sentences.
    """

    target: ClassVar[str] = "longalign.encoders.clip.flux:T5FluxEncoder"
    has_pooled: ClassVar[bool | None] = True

    name: Literal["t5-flux"] = "t5-flux"
    checkpoint: str = Field(default="black-forest-labs/FLUX.1-dev", min_length=1)
    """Hub id or local folder in diffusers layout: ``text_encoder/`` (CLIP), ``text_encoder_2/`` (T5), and their
    tokenizers.
    """
    subfolder: str | None = None
    """subfolder of the checkpoint with the text encoders and tokenizers; null: the top level."""
    pooled: Literal["mean", "first", "truncate"] = "mean"
    """which pooled embedding of CLIP (one vector per prompt) is used: ``"mean"`` over the segments, that of the
    ``"first"`` segment, or ``"truncate"``: that of the prompt truncated to 77 tokens, as in diffusers. All three are
    equal for a prompt of one segment.
    """
    segmenter: Part("segmenters") = SentenceConfig()  # type: ignore[valid-type]
    """how prompts are split into segments for CLIP. T5 encodes the whole prompt."""
    max_tokens: int = Field(default=512, ge=1)
    """number of T5 states to which shorter prompts are padded: one per token, including the end-of-text token.
    FLUX.1-schnell was trained with 256.
    """
    overflow: Literal["grow", "truncate", "error"] = "grow"
    """what to do with prompts of more than ``max_tokens`` tokens: ``"grow"`` pads the batch to the longest prompt,
    ``"truncate"`` truncates with a warning, as in diffusers, ``"error"`` raises.
    """
    window: int = Field(default=512, ge=2)
    """maximum number of tokens per forward pass of T5, including the end-of-text token. With ``overflow: grow``,
    prompts longer than both ``window`` and ``max_tokens`` are encoded in windows of whole sentences.
    """

    def _configs(self) -> list[str]:
        return [join_subfolder(self.subfolder, "text_encoder_2/config.json")]

    def widths(self) -> tuple[int | None, int | None]:
        clip = self._width_of("hidden_size", folder=join_subfolder(self.subfolder, "text_encoder"))
        return self._width_of("d_model"), clip


class ClipTruncateConfig(LoadedConfig, SingleFileConfig):
    """Encodes the whole prompt with CLIP, by default truncated to 77 tokens, as in Stable Diffusion."""

    target: ClassVar[str] = "longalign.encoders.clip.truncate:ClipTruncateEncoder"

    name: Literal["clip-truncate"] = "clip-truncate"
    checkpoint: str = Field(default="stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)
    overflow: Literal["truncate", "error", "grow"] = "truncate"
    """what to do with prompts of more than 77 tokens: ``"truncate"`` truncates with a warning, ``"error"`` raises.
    ``"grow"`` encodes the prompt in windows of whole sentences and pads the batch to the longest prompt.
    """


class LongClipConfig(LoadedConfig):
    """Encodes the whole prompt with LongCLIP, in one or more forward passes of 248 tokens."""

    target: ClassVar[str] = "longalign.encoders.clip.longclip:LongClipEncoder"

    name: Literal["longclip"] = "longclip"
    checkpoint: str = Field(default="BeichenZhang/LongCLIP-L", min_length=1)
    """Hub id, local folder, or path of a ``.pt`` or ``.safetensors`` file with the weight names of LongCLIP's authors.
    A repository or folder contains such a ``.pt`` file, or files in transformers layout.
    """
    filename: str | None = None
    """name of the published ``.pt`` file in the folder or repository. null: ``longclip-L.pt`` if it exists, otherwise
    the files in transformers layout, which are also used if ``subfolder`` or ``variant`` is set.
    """
    tokenizer: str | None = None
    """Hub id or folder of CLIP's tokenizer. null: the checkpoint's tokenizer, or that of
    ``openai/clip-vit-large-patch14`` if the checkpoint has none.
    """
    overflow: Literal["grow", "truncate", "error"] = "grow"
    """what to do with prompts of more than 248 tokens: ``"grow"`` encodes the prompt in windows of whole sentences and
    pads the batch to the longest prompt. ``"truncate"`` truncates with a warning, ``"error"`` raises.
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
            raise ValueError(
                f"remove {' and '.join(conflicts)}, which cannot be combined with the original file '{file}'"
            )
        return self
