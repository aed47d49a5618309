"""Configs of the text encoders; importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.config.files import check_single_file, join_subfolder
from longalign.encoders.config import EncoderConfig
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, missing_files_problem, read_json
from longalign.registry import Part, PartConfig
from longalign.runtime import Runtime
from longalign.segmenters import SentenceConfig

if TYPE_CHECKING:
    from longalign.encoders.clip.sd3 import ClipSegmentSD3Encoder
    from longalign.encoders.clip.sdxl import ClipSegmentSDXLEncoder
    from longalign.encoders.clip.segment import ClipSegmentEncoder
    from longalign.encoders.clip.truncate import ClipTruncateEncoder
    from longalign.encoders.concat import ConcatEncoder
    from longalign.encoders.t5.encoder import T5Encoder


class CheckpointConfig(EncoderConfig):
    """Shared by encoders that load a text model.

    Attributes:
        checkpoint: Hub id or local folder in diffusers layout (``text_encoder/``, ``tokenizer/``) or transformers
            layout; ``mini/...`` is one of the bundled small models.
        revision: branch, tag or commit of a Hub repository.
        variant: file variant of the text model, e.g. ``"fp16"`` for weights in ``model.fp16.safetensors``.
        max_batch_tokens: maximum number of positions per call of a text model; lower it to save memory.
    """

    checkpoint: str = Field(min_length=1)
    revision: str | None = None
    variant: str | None = None
    max_batch_tokens: int = Field(16384, ge=1)

    def check_files(self) -> list[ConfigProblem]:
        if self.checkpoint.endswith((".safetensors", ".pt")):
            return [] if Path(self.checkpoint).is_file() else [("checkpoint", f"no file {self.checkpoint}")]
        problem = availability_problem(self.checkpoint, self.revision) or missing_files_problem(
            self.checkpoint, self._configs(), self.revision
        )
        return [("checkpoint", problem)] if problem else []

    def _configs(self) -> list[str]:
        """Candidate paths of the text model's config."""
        return ["text_encoder/config.json", "config.json"]

    def _width_of(self, *keys: str, folder: str | None = None) -> int | None:
        """Returns the first of ``keys`` in the text model's config, or None if it is not on this machine."""
        for file in [f"{folder}/config.json"] if folder else [f for f in self._configs() if f.endswith(".json")]:
            config = read_json(self.checkpoint, file, self.revision)
            for key in keys:
                width = config.get("text_config", config).get(key)
                if isinstance(width, int):
                    return width
        return None


class _Loaded(CheckpointConfig):
    """Shared by encoders that load one text model.

    Attributes:
        subfolder: subfolder of the text model, e.g. ``text_encoder_2``; None detects it. The tokenizer's subfolder has
            ``tokenizer`` in place of ``text_encoder``.
    """

    #: whether the conditioning has a pooled embedding
    has_pooled: ClassVar[bool] = False

    subfolder: str | None = None

    def _configs(self) -> list[str]:
        return super()._configs() if self.subfolder is None else [join_subfolder(self.subfolder, "config.json")]

    def widths(self) -> tuple[int | None, int | None]:
        return self._width_of("hidden_size"), None


class SingleFileConfig(CheckpointConfig):
    """Shared by encoders that can also read a CLIP from a single-file checkpoint.

    Attributes:
        layout: for a single ``.safetensors`` checkpoint with the weight names of the original code: Hub id or folder in
            diffusers layout of a model of the same architecture. Its text-model configs and tokenizers are used; null
            takes those of Stable Diffusion 1.5, 2.1 or XL from the Hub.
    """

    #: keys that select files of a folder or repository
    selection_keys: ClassVar[tuple[str, ...]] = ("revision", "variant")

    layout: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> SingleFileConfig:
        check_single_file(self.checkpoint, self.layout, **{key: getattr(self, key) for key in self.selection_keys})
        return self


class ClipSegmentConfig(_Loaded, SingleFileConfig):
    """Segment-level encoding with CLIP.

    Attributes:
        segmenter: how prompts are split.
        sot: which segments keep their ``<sot>``.
        eot: which segments keep their ``<eot>``.
        pad: how states are padded to ``max_tokens``: the mean padding state ``<pad*>`` ("pad*"), the empty prompt's
            states ("pad"), or not at all, with a mask ("none").
        max_tokens: number of merged states; shorter prompts are padded to it.
        overflow: for a longer prompt, "grow" the batch to its length, "truncate" it with a warning, as in the published
            models, or raise an "error".
    """

    name: Literal["clip-segment"] = "clip-segment"
    checkpoint: str = Field("stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)
    segmenter: Part("segmenters") = SentenceConfig()  # type: ignore[valid-type]
    sot: Literal["all", "first", "none"] = "all"
    eot: Literal["none", "all", "last"] = "none"
    pad: Literal["pad*", "pad", "none"] = "pad*"
    max_tokens: int = Field(240, ge=1)
    overflow: Literal["grow", "truncate", "error"] = "grow"

    def build(self, runtime: Runtime) -> ClipSegmentEncoder:
        from longalign.encoders.clip.segment import ClipSegmentEncoder

        return ClipSegmentEncoder.from_config(self, runtime)


class TwoClipsConfig(CheckpointConfig):
    """Shared by segment encoders with two CLIPs.

    Attributes:
        checkpoint: Hub id or local folder in diffusers layout: ``text_encoder/``, ``text_encoder_2/``, tokenizers.
        subfolder: subfolder of the checkpoint that contains these folders; null for the top level.
        segmenter: how prompts are split.
        pooled: the pooled embedding: the "mean" over the segments, the "first" segment's, or "truncate": that of the
            prompt truncated to 77 tokens. They are equal for a prompt of one segment.
        sot: which segments keep their ``<sot>``.
        eot: which segments keep their ``<eot>``.
        pad: how states are padded to ``max_tokens``: the mean padding state ``<pad*>`` ("pad*"), the empty prompt's
            states ("pad"), or not at all, with a mask ("none").
        max_tokens: number of merged states; shorter prompts are padded to it.
        overflow: for a longer prompt, "grow" the batch to its length, "truncate" it with a warning, as in the published
            models, or raise an "error".
    """

    has_pooled: ClassVar[bool] = True

    subfolder: str | None = None
    segmenter: Part("segmenters") = SentenceConfig()  # type: ignore[valid-type]
    pooled: Literal["mean", "first", "truncate"] = "mean"
    sot: Literal["all", "first", "none"] = "all"
    eot: Literal["none", "all", "last"] = "none"
    pad: Literal["pad*", "pad", "none"] = "pad*"
    max_tokens: int = Field(240, ge=1)
    overflow: Literal["grow", "truncate", "error"] = "grow"

    def _configs(self) -> list[str]:
        return [join_subfolder(self.subfolder, "text_encoder/config.json")]

    def _from_both_configs(self, key: str) -> tuple[int | None, int | None]:
        """Returns a key of the configs of both CLIPs."""
        first, second = (
            self._width_of(key, folder=join_subfolder(self.subfolder, f"text_encoder{n}")) for n in ("", "_2")
        )
        return first, second


class ClipSegmentSDXLConfig(TwoClipsConfig, SingleFileConfig):
    """Segment-level encoding with the two CLIPs of Stable Diffusion XL.

    Attributes:
        empty: the empty prompt is encoded as "zeros", as in the SDXL pipeline, or "encode": like any other.
    """

    selection_keys: ClassVar[tuple[str, ...]] = ("subfolder", "revision", "variant")

    name: Literal["clip-segment-sdxl"] = "clip-segment-sdxl"
    checkpoint: str = Field("stabilityai/stable-diffusion-xl-base-1.0", min_length=1)
    empty: Literal["zeros", "encode"] = "zeros"

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._from_both_configs("hidden_size")
        return first + second if first and second else None, self._from_both_configs("projection_dim")[1]

    def build(self, runtime: Runtime) -> ClipSegmentSDXLEncoder:
        from longalign.encoders.clip.sdxl import ClipSegmentSDXLEncoder

        return ClipSegmentSDXLEncoder.from_config(self, runtime)


class ClipSegmentSD3Config(TwoClipsConfig):
    """Segment-level encoding with the two CLIPs of Stable Diffusion 3, followed by T5 over the whole prompt.

    Attributes:
        t5: "encode" with ``text_encoder_3``; "zeros": zero states instead, as in the diffusers pipeline without T5; or
            "none": no T5 states, so that `concat` can append a T5 with different settings.
        t5_tokens: number of T5 states, to which shorter prompts are padded, or of zero states. ``overflow`` also
            applies to T5.
        width: width of the states that the transformer expects; CLIP's states are zero-padded to it.
    """

    name: Literal["clip-segment-sd3"] = "clip-segment-sd3"
    checkpoint: str = Field("stabilityai/stable-diffusion-3-medium-diffusers", min_length=1)
    t5: Literal["encode", "zeros", "none"] = "encode"
    t5_tokens: int = Field(256, ge=1)
    width: int = Field(4096, ge=1)

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._from_both_configs("projection_dim")
        return self.width, first + second if first and second else None

    def build(self, runtime: Runtime) -> ClipSegmentSD3Encoder:
        from longalign.encoders.clip.sd3 import ClipSegmentSD3Encoder

        return ClipSegmentSD3Encoder.from_config(self, runtime)


class ClipTruncateConfig(_Loaded, SingleFileConfig):
    """CLIP over the whole prompt, truncated to 77 tokens, as in Stable Diffusion.

    Attributes:
        overflow: for a longer prompt, "truncate" it with a warning, raise an "error", or "grow": encode it in windows
            of whole sentences and extend the batch to their states.
    """

    name: Literal["clip-truncate"] = "clip-truncate"
    checkpoint: str = Field("stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)
    overflow: Literal["truncate", "error", "grow"] = "truncate"

    def build(self, runtime: Runtime) -> ClipTruncateEncoder:
        from longalign.encoders.clip.truncate import ClipTruncateEncoder

        return ClipTruncateEncoder.from_config(self, runtime)


class LongClipConfig(_Loaded):
    """LongCLIP over the whole prompt, in one or more passes of 248 tokens.

    Attributes:
        checkpoint: a Hub id or local folder, an original ``.pt`` file, or a repository that contains one.
        filename: the original file in a folder or repository; None takes ``longclip-L.pt`` if it exists, else
            transformers' files. Transformers' files are also used if ``subfolder`` or ``variant`` is set.
        tokenizer: Hub id or folder of CLIP's tokenizer; None takes the checkpoint's, or CLIP-L's if it has none.
        overflow: for a longer prompt, "grow": encode it in windows of whole sentences and extend the batch to their
            states, "truncate" it with a warning, or raise an "error".
    """

    name: Literal["longclip"] = "longclip"
    checkpoint: str = Field("BeichenZhang/LongCLIP-L", min_length=1)
    filename: str | None = None
    tokenizer: str | None = None
    overflow: Literal["grow", "truncate", "error"] = "grow"

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

    def build(self, runtime: Runtime) -> ClipTruncateEncoder:
        from longalign.encoders.clip.longclip import load_longclip

        return load_longclip(self, runtime)


class AdapterConfig(PartConfig):
    """A LaVi-Bridge adapter: loaded from ``checkpoint``, or newly initialized with the three widths.

    Attributes:
        checkpoint: Hub id or folder in diffusers layout, e.g. ``shihaozhao/LaVi-Bridge``.
        subfolder: subfolder of the checkpoint, e.g. ``t5_unet/adapter``.
        revision: branch, tag or commit of a Hub repository.
        in_dim: width of the language model, for a new adapter.
        int_dim: width between the two feed-forward blocks, for a new adapter.
        out_dim: width that the denoiser expects, for a new adapter.
        trainable: whether the adapter is trained.
    """

    name: Literal["lavi-bridge"] = "lavi-bridge"
    checkpoint: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    in_dim: int | None = Field(None, ge=1)
    int_dim: int | None = Field(None, ge=1)
    out_dim: int | None = Field(None, ge=1)
    trainable: bool = True

    def width(self) -> int | None:
        """Output width, or None if the adapter's config is not on this machine."""
        if self.checkpoint is None:
            return self.out_dim
        width = read_json(self.checkpoint, join_subfolder(self.subfolder, "config.json"), self.revision).get("out_dim")
        return width if isinstance(width, int) else None

    def check_files(self) -> list[ConfigProblem]:
        if self.checkpoint is None:
            return []
        config = [join_subfolder(self.subfolder, "config.json")]
        problem = availability_problem(self.checkpoint, self.revision) or missing_files_problem(
            self.checkpoint, config, self.revision
        )
        return [("checkpoint", problem)] if problem else []

    @model_validator(mode="after")
    def _one_source(self) -> AdapterConfig:
        given = [key for key in ("in_dim", "int_dim", "out_dim") if getattr(self, key) is not None]
        if self.checkpoint is not None and given:
            raise ValueError(f"'checkpoint' determines the widths; remove {', '.join(given)}")
        if self.checkpoint is None and len(given) < 3:
            raise ValueError("expected 'checkpoint', or in_dim, int_dim and out_dim for a new adapter")
        if self.checkpoint is None and (self.subfolder or self.revision):
            raise ValueError("'subfolder' and 'revision' need a 'checkpoint'; set it or remove them")
        return self


class T5Config(_Loaded):
    """T5's encoder over the whole prompt.

    Attributes:
        adapter: maps T5's states to the denoiser's width; None keeps T5's width.
        max_tokens: number of states, including the end-of-text token; shorter prompts are padded to it.
        overflow: for a longer prompt, "grow" the batch to its length, "truncate" it with a warning, as in the published
            model, or raise an "error".
        window: maximum number of tokens per pass, including the end-of-text token. With "grow", a prompt longer than
            this and ``max_tokens`` is encoded in windows of whole sentences, so memory is linear in its length. T5 was
            trained with 512.
        mask: whether to mask padding; the published model does not.
    """

    name: Literal["t5"] = "t5"
    checkpoint: str = Field("google-t5/t5-large", min_length=1)
    adapter: AdapterConfig | None = None
    max_tokens: int = Field(240, ge=1)
    overflow: Literal["grow", "truncate", "error"] = "grow"
    window: int = Field(512, ge=2)
    mask: bool = False

    def widths(self) -> tuple[int | None, int | None]:
        return self._width_of("d_model") if self.adapter is None else self.adapter.width(), None

    def build(self, runtime: Runtime) -> T5Encoder:
        from longalign.encoders.t5.encoder import T5Encoder

        return T5Encoder.from_config(self, runtime)


class ConcatConfig(EncoderConfig):
    """Several encoders, with states concatenated along the sequence axis.

    Attributes:
        parts: the encoders, in order.
    """

    name: Literal["concat"] = "concat"
    parts: list[Part("encoders")] = Field(min_length=1)  # type: ignore[valid-type]

    @property
    def has_pooled(self) -> bool | None:
        """Whether a part has a pooled embedding; None if unknown."""
        pooled = [getattr(part, "has_pooled", None) for part in self.parts]
        return True if True in pooled else None if None in pooled else False

    @model_validator(mode="after")
    def _one_pooled(self) -> ConcatConfig:
        names = [part.name for part in self.parts if getattr(part, "has_pooled", None)]
        if len(names) > 1:
            raise ValueError(f"expected at most one part with a pooled embedding, got {', '.join(names)}")
        return self

    def check_files(self) -> list[ConfigProblem]:
        widths = {part.name: width for part in self.parts if (width := part.widths()[0]) is not None}
        if len(set(widths.values())) < 2:
            return []
        shown = ", ".join(f"{width} from '{name}'" for name, width in widths.items())
        return [("parts", f"expected states of equal width, got {shown}; add an adapter")]

    def widths(self) -> tuple[int | None, int | None]:
        known = [part.widths() for part in self.parts]
        return (
            next((states for states, _ in known if states is not None), None),
            next((pooled for _, pooled in known if pooled is not None), None),
        )

    def build(self, runtime: Runtime) -> ConcatEncoder:
        from longalign.encoders.concat import ConcatEncoder

        return ConcatEncoder.from_config(self, runtime)
