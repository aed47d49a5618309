"""The base class of encoder configs; no torch here."""

from __future__ import annotations

from typing import ClassVar

from longalign.registry import PartConfig


class EncoderConfig(PartConfig):
    """Base class of encoder configs."""

    #: whether the conditioning has a pooled embedding; None if unknown
    has_pooled: ClassVar[bool | None] = None

    def gives_pooled(self) -> bool | None:
        """Whether the conditioning has a pooled embedding; None if unknown."""
        return self.has_pooled

    def widths(self) -> tuple[int | None, int | None]:
        """Widths of the states and of the pooled embedding, from the config and small local files; None if unknown."""
        return None, None
