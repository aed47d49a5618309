"""The data `my-part`."""

from __future__ import annotations

from typing import Any

import torch
from my_plugin.config import MyPartConfig

from longalign.data import Data, check_index
from longalign.runtime import Runtime

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class MyPart(Data):
    """Items ``{"prompt": str, "image": (3, h, w)}``, pixels in [0, 1]. Item i must be the same whenever it is read.

    Args:
        size: number of items.
        resolution: side of the square images in pixels.
    """

    def __init__(self, *, size: int, resolution: int):
        self.size, self.resolution = size, resolution

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        """Builds the data. Open files here."""
        return cls(size=config.size, resolution=config.resolution)

    def __len__(self) -> int:
        return self.size

    def prompt(self, index: int) -> str:
        return f"A picture that is {list(COLOURS)[check_index(index, self.size) % len(COLOURS)]} all over."

    def __getitem__(self, index: int) -> dict[str, Any]:
        colour = list(COLOURS.values())[check_index(index, self.size) % len(COLOURS)]
        image = torch.tensor(colour)[:, None, None].expand(3, self.resolution, self.resolution).clone()
        return {"prompt": self.prompt(index), "image": image}
