"""Dataset of synthetic scenes with captions, rendered on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longalign.data.base import Data, check_index
from longalign.data.scenes.config import SyntheticConfig
from longalign.mini.captions import STYLES, Caption, describe
from longalign.mini.scenes import Scene, render_batch, sample_scene
from longalign.runtime import Runtime


class Scenes(Data):
    """Dataset of synthetic scenes. An item is ``{"prompt": str, "image": float32 (3, 64, 64) in [0, 1]}``.

    Args:
        size: number of items.
        seed: random seed; the seed and the index of an item determine its scene and caption.
        objects: lowest and highest number of objects in a scene, from 0 to 9.
        words: lowest and highest target length of a caption in words.
        style: style of the captions: "plain", "referring", or "mixed" for both; see `longalign.mini.describe`.
        filler: whether captions with too few facts for their target length also have sentences that state no fact.
    """

    def __init__(
        self, *, size: int, seed: int, objects: tuple[int, int], words: tuple[int, int], style: str, filler: bool
    ):
        self.size, self.seed, self.objects, self.words, self.style = size, seed, objects, words, style
        self.filler = filler

    @classmethod
    def from_config(cls, config: SyntheticConfig, runtime: Runtime) -> Scenes:
        return cls(**config.model_dump(include={"size", "seed", "objects", "words", "style", "filler"}))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, caption = self.scene(index)
        return {"prompt": caption.text, "image": torch.from_numpy(render_batch([scene])[0])}

    def prompt(self, index: int) -> str:
        return self.scene(index)[1].text

    def scene(self, index: int) -> tuple[Scene, Caption]:
        """Returns the scene of item ``index``, and its caption with the facts of each sentence."""
        rng = np.random.default_rng([self.seed, check_index(index, self.size)])
        scene = sample_scene(rng, self.objects)
        words = int(rng.integers(self.words[0], self.words[1] + 1))
        style = STYLES[int(rng.integers(len(STYLES)))] if self.style == "mixed" else self.style
        return scene, describe(scene, rng, words=words, style=style, filler=self.filler)
