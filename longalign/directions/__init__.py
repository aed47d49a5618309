"""Directions: unit vectors in the embedding space of a reward, such as the mean direction of text embeddings.

They are estimated while training, or computed once and kept in a file.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.directions.common import CommonDirection as CommonDirection
    from longalign.directions.common import UndefinedDirection as UndefinedDirection
    from longalign.directions.compute import compute_direction as compute_direction
    from longalign.directions.compute import measure_direction as measure_direction
    from longalign.directions.file import Direction as Direction
    from longalign.directions.file import load_direction as load_direction

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CommonDirection": "common",
        "Direction": "file",
        "UndefinedDirection": "common",
        "compute_direction": "compute",
        "load_direction": "file",
        "measure_direction": "compute",
    },
)
