"""Base configs of encoders, and the config of `concat`; no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from longalign.config.files import join_subfolder
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, missing_files_problem, read_json
from longalign.registry import Part, PartConfig


class EncoderConfig(PartConfig):
    """Base class of encoder configs."""

    #: whether the conditioning has a pooled embedding; None if unknown
    has_pooled: ClassVar[bool | None] = None
    #: key of the config of an adapter (`longalign.encoders.adapter.Adapter`); None if there is none. The adapter is the
    #: encoder's last step, and its attribute of this name. If the key is null, the encoder is built without it
    adapter_key: ClassVar[str | None] = None

    def gives_pooled(self) -> bool | None:
        """Whether the conditioning has a pooled embedding; None if unknown."""
        return self.has_pooled

    def widths(self) -> tuple[int | None, int | None]:
        """Widths of the states and of the pooled embedding, from the config and small local files; None if unknown."""
        return None, None

    def inner_encoders(self) -> Sequence[EncoderConfig]:
        """Configs of the encoders that this one combines; empty if it combines none.

        If there are any, ``from_config`` also takes ``parts``: these encoders, already built, or None to build them.
        """
        return ()

    def leaves(self) -> list[EncoderConfig]:
        """The encoders that are cached separately: the leaves of the inner encoders, or this encoder."""
        inner = self.inner_encoders()
        return [leaf for part in inner for leaf in part.leaves()] if inner else [self]

    def adapter_config(self) -> PartConfig | None:
        """The adapter's config, or None without an adapter."""
        return None if self.adapter_key is None else getattr(self, self.adapter_key)

    def frozen_config(self) -> EncoderConfig:
        """The config of the encoder without its adapter."""
        return self if self.adapter_key is None else self.model_copy(update={self.adapter_key: None})


class CheckpointConfig(EncoderConfig):
    """Shared by encoders that load a text model."""

    checkpoint: str = Field(min_length=1)
    """Hub id or local folder in diffusers layout (``text_encoder/``, ``tokenizer/``) or transformers layout;
    ``mini/...`` is one of the bundled small models.
    """
    revision: str | None = None
    """branch, tag or commit of a Hub repository."""
    variant: str | None = None
    """file variant of the text model, e.g. ``"fp16"`` for weights in ``model.fp16.safetensors``."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """maximum number of positions per call of a text model; lower it to save memory."""

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


class LoadedConfig(CheckpointConfig):
    """Shared by encoders that load one text model, which gives no pooled embedding."""

    has_pooled: ClassVar[bool | None] = False

    subfolder: str | None = None
    """subfolder of the text model, e.g. ``text_encoder_2``; None detects it. The tokenizer's subfolder has
    ``tokenizer`` in place of ``text_encoder``.
    """

    def _configs(self) -> list[str]:
        return super()._configs() if self.subfolder is None else [join_subfolder(self.subfolder, "config.json")]

    def widths(self) -> tuple[int | None, int | None]:
        return self._width_of("hidden_size"), None


class ConcatConfig(EncoderConfig):
    """Several encoders, with states concatenated along the sequence axis."""

    target: ClassVar[str] = "longalign.encoders.concat:ConcatEncoder"

    name: Literal["concat"] = "concat"
    parts: list[Part("encoders")] = Field(min_length=1)  # type: ignore[valid-type]
    """the encoders, in order."""

    def inner_encoders(self) -> Sequence[EncoderConfig]:
        return self.parts

    def gives_pooled(self) -> bool | None:
        pooled = [part.gives_pooled() for part in self.parts]
        return True if True in pooled else None if None in pooled else False

    @model_validator(mode="after")
    def _one_pooled(self) -> ConcatConfig:
        names = [part.name for part in self.parts if part.gives_pooled()]
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
