"""Scenes of the small world as data, drawn on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longalign.data.base import Data, check_index
from longalign.data.configs import ScenesConfig
from longalign.mini.captions import STYLES, Caption, describe
from longalign.mini.scenes import Scene, render_batch, sample_scene
from longalign.runtime import Runtime


class Scenes(Data):
    """``size`` scenes with their captions; see `longalign.data.configs.ScenesConfig` for the arguments."""

    def __init__(
        self,
        size: int,
        seed: int = 0,
        objects: tuple[int, int] = (1, 9),
        words: tuple[int, int] = (20, 250),
        style: str = "plain",
    ):
        self.size, self.seed, self.objects, self.words, self.style = size, seed, objects, words, style

    @classmethod
    def from_config(cls, config: ScenesConfig, runtime: Runtime) -> Scenes:
        return cls(config.size, config.seed, config.objects, config.words, config.style)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, caption = self.scene(index)
        return {"prompt": caption.text, "image": torch.from_numpy(render_batch([scene])[0])}

    def prompt(self, index: int) -> str:
        return self.scene(index)[1].text

    def scene(self, index: int) -> tuple[Scene, Caption]:
        """What is in image ``index``, and its caption with the facts of each sentence."""
        rng = np.random.default_rng([self.seed, check_index(index, self.size)])
        scene = sample_scene(rng, self.objects)
        words = int(rng.integers(self.words[0], self.words[1] + 1))
        style = STYLES[int(rng.integers(len(STYLES)))] if self.style == "mixed" else self.style
        return scene, describe(scene, rng, words=words, style=style)
