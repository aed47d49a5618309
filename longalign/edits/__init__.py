"""Edits: functions that change the text embedding of a reward before scoring, for the reward `edited`.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.edits.base import Edit as Edit
    from longalign.edits.base import EditedText as EditedText
    from longalign.edits.config import DirectionConfig as DirectionConfig
    from longalign.edits.config import EditConfig as EditConfig
    from longalign.edits.config import MeasuredConfig as MeasuredConfig
    from longalign.edits.config import NoEditConfig as NoEditConfig
    from longalign.edits.config import PairsEditConfig as PairsEditConfig
    from longalign.edits.direction import DirectionEdit as DirectionEdit
    from longalign.edits.pairs import PairsEdit as PairsEdit

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DirectionConfig": "config",
        "DirectionEdit": "direction",
        "Edit": "base",
        "EditConfig": "config",
        "EditedText": "base",
        "MeasuredConfig": "config",
        "NoEditConfig": "config",
        "PairsEditConfig": "config",
        "PairsEdit": "pairs",
    },
)
