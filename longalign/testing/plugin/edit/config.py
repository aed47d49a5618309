"""The config of `my-part`. It does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longalign.edits import EditConfig


class MyPartConfig(EditConfig):
    """Moves a reward's text embedding away from that of a phrase. Replace it with your edit."""

    target: ClassVar[str] = "my_plugin.part:MyPart"

    name: Literal["my-part"] = "my-part"
    phrase: str = "blurry"
    """The phrase, a text."""
    weight: float = Field(0.2, ge=0)
    """Factor of the phrase's embedding; 0 leaves the text embedding unchanged."""
