"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.encoders import EncoderConfig


class MyPartConfig(EncoderConfig):
    """One hidden state per word, from a fixed random table. Replace it with your text model."""

    target: ClassVar[str] = "my_plugin.part:MyPart"
    has_pooled: ClassVar[bool] = False

    name: Literal["my-part"] = "my-part"
    width: int = Field(128, ge=1)
    """Width of the states, which must be that of the denoiser's cross-attention."""
    min_states: int = Field(77, ge=1)
    """Number of states to which shorter prompts are padded; longer ones are not truncated."""

    def widths(self) -> tuple[int | None, int | None]:
        return self.width, None
