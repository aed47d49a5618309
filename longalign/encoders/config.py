"""Base classes of encoder configs, and the config of `concat`. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from longalign.errors import ConfigProblem
from longalign.files.paths import join_subfolder
from longalign.hub import checkpoint_problem, read_json
from longalign.registry import Part, PartConfig


class EncoderConfig(PartConfig):
    """Base class of encoder configs: selects an encoder and its settings."""

    #: whether the encoder's conditioning has a pooled embedding; None if unknown
    has_pooled: ClassVar[bool | None] = None
    #: config key of the adapter (`longalign.encoders.adapter.Adapter`); None if the encoder cannot have one. The
    #: adapter must be the encoder's last step, in an attribute named like the key. A null value means no adapter
    adapter_key: ClassVar[str | None] = None

    def gives_pooled(self) -> bool | None:
        """Returns whether the encoder's conditioning has a pooled embedding; None if unknown."""
        return self.has_pooled

    def widths(self) -> tuple[int | None, int | None]:
        """Returns the width d of the states and the width p of the pooled embedding.

        A width is None if it is unknown; p is also None without a pooled embedding. Only the config and small local
        files are read; nothing is downloaded.
        """
        return None, None

    def inner_encoders(self) -> Sequence[EncoderConfig]:
        """Returns the configs of the encoders that this encoder combines; empty if it combines none.

        If not empty, the encoder's ``from_config`` must accept a keyword ``parts``: the list of built inner encoders,
        or None, which makes ``from_config`` build them.
        """
        return ()

    def leaves(self) -> list[EncoderConfig]:
        """Returns the configs of the encoders whose states are cached separately.

        These are the leaves of all inner encoders, or this config alone if there are no inner encoders.
        """
        inner = self.inner_encoders()
        return [leaf for part in inner for leaf in part.leaves()] if inner else [self]

    def adapter_config(self) -> PartConfig | None:
        """Returns the config of the adapter, or None without an adapter."""
        return None if self.adapter_key is None else getattr(self, self.adapter_key)

    def frozen_config(self) -> EncoderConfig:
        """Returns this config without the adapter, so that only frozen text models remain."""
        return self if self.adapter_key is None else self.model_copy(update={self.adapter_key: None})


class CheckpointConfig(EncoderConfig):
    """Base class of the configs of encoders that load text models from a checkpoint."""

    checkpoint: str = Field(min_length=1)
    """Hub id or local folder in diffusers layout (``text_encoder/``, ``tokenizer/``) or transformers layout, or
    ``mini/<folder>`` for a small model bundled with longalign.
    """
    revision: str | None = None
    """branch, tag or commit of a Hub repository; null: the default branch."""
    variant: str | None = None
    """file variant of the text model's weights, e.g. ``"fp16"`` for ``model.fp16.safetensors``; null: the files without
    a variant.
    """
    max_batch_tokens: int = Field(default=16384, ge=1)
    """maximum number of tokens, including padding, per call of a text model; a lower value saves memory."""

    def check_files(self) -> list[ConfigProblem]:
        if self.checkpoint.endswith((".safetensors", ".pt")):
            return (
                []
                if Path(self.checkpoint).is_file()
                else [("checkpoint", f"no file {self.checkpoint}; expected the path of an existing file")]
            )
        problem = checkpoint_problem(self.checkpoint, self._configs(), self.revision)
        return [("checkpoint", problem)] if problem else []

    def _configs(self) -> list[str]:
        """Returns paths in the checkpoint of which one must exist, normally of the text model's ``config.json``."""
        return ["text_encoder/config.json", "config.json"]

    def _width_of(self, *keys: str, folder: str | None = None) -> int | None:
        """Returns the integer under the first of ``keys`` that the text model's ``config.json`` contains.

        Returns None if the file contains none of ``keys``, or is not available locally. ``folder`` is the file's folder
        in the checkpoint; None: the paths of `_configs`.
        """
        for file in [f"{folder}/config.json"] if folder else [f for f in self._configs() if f.endswith(".json")]:
            config = read_json(self.checkpoint, file, self.revision)
            for key in keys:
                width = config.get("text_config", config).get(key)
                if isinstance(width, int):
                    return width
        return None


class LoadedConfig(CheckpointConfig):
    """Base class of the configs of encoders that load one text model and return no pooled embedding."""

    has_pooled: ClassVar[bool | None] = False

    subfolder: str | None = None
    """subfolder of the text model, e.g. ``text_encoder_2``; null: ``text_encoder`` if it exists, otherwise the top
    level. The tokenizer's subfolder has the same name with ``tokenizer`` in place of ``text_encoder``.
    """

    def _configs(self) -> list[str]:
        return super()._configs() if self.subfolder is None else [join_subfolder(self.subfolder, "config.json")]

    def widths(self) -> tuple[int | None, int | None]:
        return self._width_of("hidden_size"), None


class ConcatConfig(EncoderConfig):
    """Concatenates the states of several encoders along the sequence axis."""

    target: ClassVar[str] = "longalign.encoders.concat:ConcatEncoder"

    name: Literal["concat"] = "concat"
    parts: list[Part("encoders")] = Field(min_length=1)  # type: ignore[valid-type]
    """the encoders, in the order in which their states are concatenated. The widths of the states must be equal, and at
    most one encoder may return a pooled embedding.
    """

    def inner_encoders(self) -> Sequence[EncoderConfig]:
        return self.parts

    def gives_pooled(self) -> bool | None:
        pooled = [part.gives_pooled() for part in self.parts]
        return True if True in pooled else None if None in pooled else False

    @model_validator(mode="after")
    def _one_pooled(self) -> ConcatConfig:
        names = [part.name for part in self.parts if part.gives_pooled()]
        if len(names) > 1:
            raise ValueError(
                f"expected at most one encoder with a pooled embedding, got {', '.join(names)}; remove one"
            )
        return self

    def check_files(self) -> list[ConfigProblem]:
        widths = {part.name: width for part in self.parts if (width := part.widths()[0]) is not None}
        if len(set(widths.values())) < 2:
            return []
        shown = ", ".join(f"{width} from '{name}'" for name, width in widths.items())
        return [("parts", f"expected states of equal width, got {shown}; add an adapter to one of the encoders")]

    def widths(self) -> tuple[int | None, int | None]:
        known = [part.widths() for part in self.parts]
        return (
            next((states for states, _ in known if states is not None), None),
            next((pooled for _, pooled in known if pooled is not None), None),
        )
