"""What a part needs to know about the machine it runs on; importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any


def _alone(tensor: Any) -> Any:
    return tensor


@dataclass(frozen=True)
class Runtime:
    """Where parts are built and how processes talk.

    Attributes:
        device: a torch device string, e.g. ``"cuda"``.
        dtype: the dtype of frozen modules: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Whatever is trained
            stays in float32.
        gather: takes a tensor ``(b, ...)`` of this process and returns ``(b * processes, ...)`` of all of them,
            without gradient. Alone it is the identity.
    """

    device: str = "cpu"
    dtype: str = "float32"
    gather: Callable[[Any], Any] = _alone

    @property
    def torch_dtype(self) -> Any:
        """The torch dtype of ``dtype``. Imports torch."""
        import torch

        return getattr(torch, self.dtype)


def resolve_checkpoint(checkpoint: str) -> str:
    """Turns ``mini`` or ``mini/<folder>`` into the folder of the bundled small weights; anything else is returned as is.

    An existing local path of the same name wins, so nothing that a user has on disk is hidden.
    """
    if (checkpoint == "mini" or checkpoint.startswith("mini/")) and not Path(checkpoint).exists():
        folder = Path(str(resources.files("longalign.mini"))) / "weights" / checkpoint.removeprefix("mini").lstrip("/")
        if not folder.exists():
            names = sorted(p.name for p in (folder.parent if folder.parent.exists() else folder.parent.parent).iterdir())
            raise ValueError(f"no bundled weights '{checkpoint}'; expected 'mini' or 'mini/<folder>' with one of {names}")
        return str(folder)
    return checkpoint
