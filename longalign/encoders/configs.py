"""Configs of the text encoders; importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.errors import ConfigProblem
from longalign.files import check_single_file, join_subfolder
from longalign.hub import absent, incomplete, read_json
from longalign.registry import Part, PartConfig
from longalign.runtime import Runtime
from longalign.segment import SentenceConfig

if TYPE_CHECKING:
    from longalign.encoders.clip_segment import ClipSegmentEncoder
    from longalign.encoders.clip_segment_sd3 import ClipSegmentSD3Encoder
    from longalign.encoders.clip_segment_sdxl import ClipSegmentSDXLEncoder
    from longalign.encoders.clip_truncate import ClipTruncateEncoder
    from longalign.encoders.concat import ConcatEncoder
    from longalign.encoders.t5 import T5Encoder


class CheckpointConfig(PartConfig):
    """What encoders that load a text model share.

    Attributes:
        checkpoint: a hub id or a local folder in diffusers layout (``text_encoder/``, ``tokenizer/``) or transformers
            layout; ``mini/...`` is one of the bundled small models.
        revision: branch, tag or commit of a hub repository.
        variant: file variant of the text model, e.g. ``"fp16"`` for weights in ``model.fp16.safetensors``.
        max_batch_tokens: most positions in one call of a text model; lower it to save memory.
    """

    checkpoint: str = Field(min_length=1)
    revision: str | None = None
    variant: str | None = None
    max_batch_tokens: int = Field(16384, ge=1)

    def check_files(self) -> list[ConfigProblem]:
        if self.checkpoint.endswith((".safetensors", ".pt")):
            return [] if Path(self.checkpoint).is_file() else [("checkpoint", f"no file {self.checkpoint}")]
        problem = absent(self.checkpoint, self.revision) or incomplete(self.checkpoint, self._configs(), self.revision)
        return [("checkpoint", problem)] if problem else []

    def _configs(self) -> list[str]:
        """The text model's config, in each of the places where it may be."""
        return ["text_encoder/config.json", "config.json"]

    def _width_of(self, *keys: str, inside: str | None = None) -> int | None:
        """The first of some keys of the text model's config, as far as it is on this machine."""
        for file in [f"{inside}/config.json"] if inside else [f for f in self._configs() if f.endswith(".json")]:
            config = read_json(self.checkpoint, file, self.revision)
            for key in keys:
                width = config.get("text_config", config).get(key)
                if isinstance(width, int):
                    return width
        return None


class _Loaded(CheckpointConfig):
    """What encoders that load one text model share.

    Attributes:
        subfolder: where in the checkpoint the text model is, e.g. ``text_encoder_2``; None finds it. A tokenizer is
            looked for in the subfolder that says ``tokenizer`` instead of ``text_encoder``.
    """

    #: whether the conditioning has a pooled embedding
    has_pooled: ClassVar[bool] = False

    subfolder: str | None = None

    def _configs(self) -> list[str]:
        return super()._configs() if self.subfolder is None else [join_subfolder(self.subfolder, "config.json")]

    def widths(self) -> tuple[int | None, int | None]:
        return self._width_of("hidden_size"), None


class SingleFileConfig(CheckpointConfig):
    """What encoders share that read a CLIP out of a single file, too.

    Attributes:
        layout: where ``checkpoint`` is one ``.safetensors`` file, which holds text models, UNet and VAE under the names
            of the original code: hub id or folder in diffusers layout of a model of the same architecture, of which
            the text models' configs and the tokenizers are read; null takes the hub's for Stable Diffusion 1.5, 2.1
            and XL.
    """

    #: keys that choose among the files of a folder or repository
    choosing: ClassVar[tuple[str, ...]] = ("revision", "variant")

    layout: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> SingleFileConfig:
        check_single_file(self.checkpoint, self.layout, **{key: getattr(self, key) for key in self.choosing})
        return self


class ClipSegmentConfig(_Loaded, SingleFileConfig):
    """Segment-level encoding with CLIP.

    Attributes:
        segmenter: how prompts are split.
        sot: which segments keep their ``<sot>``.
        eot: which segments keep their ``<eot>``.
        pad: what fills up to ``max_tokens``: one ``<pad*>``, the empty prompt's plain padding, or nothing (and a mask).
        max_tokens: number of merged states, up to which shorter prompts are filled.
        overflow: what becomes of a longer prompt: it is read to its end and the batch "grow"s to its length, it is
            truncated with a warning ("truncate"), as in the published models, or it is an "error".
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
        from longalign.encoders.clip_segment import ClipSegmentEncoder

        return ClipSegmentEncoder.from_config(self, runtime)


class TwoClipsConfig(CheckpointConfig):
    """What encoders of segments with two CLIPs share.

    Attributes:
        checkpoint: a hub id or a local folder in diffusers layout: ``text_encoder/``, ``text_encoder_2/``, tokenizers.
        subfolder: where in the checkpoint these folders are; null if they are at its top.
        segmenter: how prompts are split.
        pooled: the pooled embedding: the "mean" over the segments, the "first" segment's, or "truncate": that of the
            prompt cut at 77 tokens. They agree on a prompt of one segment.
        sot: which segments keep their ``<sot>``.
        eot: which segments keep their ``<eot>``.
        pad: what fills up to ``max_tokens``: one ``<pad*>``, the empty prompt's plain padding, or nothing (and a mask).
        max_tokens: number of merged states, up to which shorter prompts are filled.
        overflow: what becomes of a longer prompt: it is read to its end and the batch "grow"s to its length, it is
            truncated with a warning ("truncate"), as in the published models, or it is an "error".
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

    def _both(self, key: str) -> tuple[int | None, int | None]:
        """A key of the two CLIPs' configs."""
        first, second = (
            self._width_of(key, inside=join_subfolder(self.subfolder, f"text_encoder{n}")) for n in ("", "_2")
        )
        return first, second


class ClipSegmentSDXLConfig(TwoClipsConfig, SingleFileConfig):
    """Segment-level encoding with the two CLIPs of Stable Diffusion XL.

    Attributes:
        empty: the empty prompt is told as "zeros", as SDXL's pipeline has it, or "encode": like any other.
    """

    choosing: ClassVar[tuple[str, ...]] = ("subfolder", "revision", "variant")

    name: Literal["clip-segment-sdxl"] = "clip-segment-sdxl"
    checkpoint: str = Field("stabilityai/stable-diffusion-xl-base-1.0", min_length=1)
    empty: Literal["zeros", "encode"] = "zeros"

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._both("hidden_size")
        return first + second if first and second else None, self._both("projection_dim")[1]

    def build(self, runtime: Runtime) -> ClipSegmentSDXLEncoder:
        from longalign.encoders.clip_segment_sdxl import ClipSegmentSDXLEncoder

        return ClipSegmentSDXLEncoder.from_config(self, runtime)


class ClipSegmentSD3Config(TwoClipsConfig):
    """Segment-level encoding with the two CLIPs of Stable Diffusion 3, followed by T5 over the whole prompt.

    Attributes:
        t5: "encode" with ``text_encoder_3``; "zeros" in the place of its states, as diffusers' pipeline without T5 has
            it; or "none", nothing, so that `concat` can put a T5 of other settings behind.
        t5_tokens: number of T5's states, up to which shorter prompts are padded, or of zeros. ``overflow`` is T5's too.
        width: of the states, which the transformer expects; CLIP's are filled up with zeros.
    """

    name: Literal["clip-segment-sd3"] = "clip-segment-sd3"
    checkpoint: str = Field("stabilityai/stable-diffusion-3-medium-diffusers", min_length=1)
    t5: Literal["encode", "zeros", "none"] = "encode"
    t5_tokens: int = Field(256, ge=1)
    width: int = Field(4096, ge=1)

    def widths(self) -> tuple[int | None, int | None]:
        first, second = self._both("projection_dim")
        return self.width, first + second if first and second else None

    def build(self, runtime: Runtime) -> ClipSegmentSD3Encoder:
        from longalign.encoders.clip_segment_sd3 import ClipSegmentSD3Encoder

        return ClipSegmentSD3Encoder.from_config(self, runtime)


class ClipTruncateConfig(_Loaded, SingleFileConfig):
    """CLIP over the whole prompt, cut at 77 tokens: what Stable Diffusion does.

    Attributes:
        overflow: what happens to a longer prompt: "truncate" it with a warning, raise an "error", or "grow": it is
            read in windows of whole sentences and the batch "grow"s to their states.
    """

    name: Literal["clip-truncate"] = "clip-truncate"
    checkpoint: str = Field("stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)
    overflow: Literal["truncate", "error", "grow"] = "truncate"

    def build(self, runtime: Runtime) -> ClipTruncateEncoder:
        from longalign.encoders.clip_truncate import ClipTruncateEncoder

        return ClipTruncateEncoder.from_config(self, runtime)


class LongClipConfig(_Loaded):
    """LongCLIP over the whole prompt, in one pass of 248 tokens or in as many as it needs.

    Attributes:
        checkpoint: besides the usual, an original ``.pt`` file or a repository that has one.
        filename: the original file in a folder or repository; None takes ``longclip-L.pt`` if there is one, else
            transformers' files. These are also taken where ``subfolder`` or ``variant`` chooses among them.
        tokenizer: hub id or folder of CLIP's tokenizer; None takes the checkpoint's, or CLIP-L's where it has none.
        overflow: what becomes of a longer prompt: it is read in windows of whole sentences and the batch "grow"s to
            their states, it is truncated with a warning ("truncate"), or it is an "error".
    """

    name: Literal["longclip"] = "longclip"
    checkpoint: str = Field("BeichenZhang/LongCLIP-L", min_length=1)
    filename: str | None = None
    tokenizer: str | None = None
    overflow: Literal["grow", "truncate", "error"] = "grow"

    def check_files(self) -> list[ConfigProblem]:
        problem = self.tokenizer and absent(self.tokenizer)
        return super().check_files() + ([("tokenizer", problem)] if problem else [])

    def _configs(self) -> list[str]:
        return [self.filename] if self.filename else ["longclip-L.pt", *super()._configs()]

    @model_validator(mode="after")
    def _one_file(self) -> LongClipConfig:
        single = self.checkpoint.endswith((".pt", ".safetensors"))
        others = ("filename", "subfolder", "revision", "variant") if single else ("subfolder", "variant")
        given = [f"'{key}'" for key in others if getattr(self, key) is not None]
        if given and (single or self.filename is not None):
            file = self.checkpoint if single else self.filename
            raise ValueError(f"{' and '.join(given)} would choose another file than the original '{file}'; leave out")
        return self

    def build(self, runtime: Runtime) -> ClipTruncateEncoder:
        from longalign.encoders.longclip import load_longclip

        return load_longclip(self, runtime)


class AdapterConfig(PartConfig):
    """A LaVi-Bridge adapter: loaded from ``checkpoint``, or fresh with the three widths.

    Attributes:
        checkpoint: hub id or folder as diffusers writes it, e.g. ``shihaozhao/LaVi-Bridge``.
        subfolder: where in it, e.g. ``t5_unet/adapter``.
        revision: branch, tag or commit of a hub repository.
        in_dim: width of the language model, for a fresh adapter.
        int_dim: width between its two feed-forward blocks, for a fresh adapter.
        out_dim: width that the denoiser expects, for a fresh adapter.
        trainable: whether training changes it.
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
        """Of what comes out, as far as files on this machine tell."""
        if self.checkpoint is None:
            return self.out_dim
        width = read_json(self.checkpoint, join_subfolder(self.subfolder, "config.json"), self.revision).get("out_dim")
        return width if isinstance(width, int) else None

    def check_files(self) -> list[ConfigProblem]:
        if self.checkpoint is None:
            return []
        config = [join_subfolder(self.subfolder, "config.json")]
        problem = absent(self.checkpoint, self.revision) or incomplete(self.checkpoint, config, self.revision)
        return [("checkpoint", problem)] if problem else []

    @model_validator(mode="after")
    def _one_source(self) -> AdapterConfig:
        given = [key for key in ("in_dim", "int_dim", "out_dim") if getattr(self, key) is not None]
        if self.checkpoint is not None and given:
            raise ValueError(f"'checkpoint' fixes the widths; leave out {', '.join(given)}")
        if self.checkpoint is None and len(given) < 3:
            raise ValueError("expected 'checkpoint', or in_dim, int_dim and out_dim for a fresh adapter")
        if self.checkpoint is None and (self.subfolder or self.revision):
            raise ValueError("'subfolder' and 'revision' belong to a 'checkpoint'")
        return self


class T5Config(_Loaded):
    """T5's encoder over the whole prompt.

    Attributes:
        adapter: maps T5's states to the denoiser's width; None leaves them as they are.
        max_tokens: number of states, the end-of-text token included, up to which shorter prompts are padded.
        overflow: what becomes of a longer prompt: it is read to its end and the batch "grow"s to its length, it is
            truncated with a warning ("truncate"), as in the published model, or it is an "error".
        window: most tokens in one pass, the end-of-text token included; a prompt that grows beyond it, and beyond
            ``max_tokens``, is read in windows of whole sentences, so that memory is linear in its length. T5 was
            trained with 512.
        mask: whether padding is masked; the published model does not.
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
        from longalign.encoders.t5 import T5Encoder

        return T5Encoder.from_config(self, runtime)


class ConcatConfig(PartConfig):
    """Several encoders, their states one after the other.

    Attributes:
        parts: the encoders, in order.
    """

    name: Literal["concat"] = "concat"
    parts: list[Part("encoders")] = Field(min_length=1)  # type: ignore[valid-type]

    @property
    def has_pooled(self) -> bool | None:
        """Whether a part gives a pooled embedding; None if one does not say."""
        conditioning = [getattr(part, "has_pooled", None) for part in self.parts]
        return True if True in conditioning else None if None in conditioning else False

    @model_validator(mode="after")
    def _one_pooled(self) -> ConcatConfig:
        named = [part.name for part in self.parts if getattr(part, "has_pooled", None)]
        if len(named) > 1:
            raise ValueError(f"expected at most one part with a pooled embedding, got {', '.join(named)}")
        return self

    def check_files(self) -> list[ConfigProblem]:
        widths = {part.name: width for part in self.parts if (width := part.widths()[0]) is not None}
        if len(set(widths.values())) < 2:
            return []
        conditioning = ", ".join(f"{width} of '{name}'" for name, width in widths.items())
        return [("parts", f"their states must have one width, got {conditioning}; give one an adapter")]

    def widths(self) -> tuple[int | None, int | None]:
        known = [part.widths() for part in self.parts]
        return (
            next((states for states, _ in known if states is not None), None),
            next((pooled for _, pooled in known if pooled is not None), None),
        )

    def build(self, runtime: Runtime) -> ConcatEncoder:
        from longalign.encoders.concat import ConcatEncoder

        return ConcatEncoder.from_config(self, runtime)
