"""Data from the synthetic scenes, rendered on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longalign.data.base import Data, check_index
from longalign.data.configs import ScenePairsConfig, ScenesConfig
from longalign.mini.captions import STYLES, Caption, describe
from longalign.mini.preferences import preference, vary
from longalign.mini.scenes import Scene, render_batch, sample_scene
from longalign.runtime import Runtime


class Scenes(Data):
    """``size`` scenes with captions. `longalign.data.configs.ScenesConfig` describes the arguments."""

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
        """Scene of image ``index``, and its caption with the facts of each sentence."""
        rng = np.random.default_rng([self.seed, check_index(index, self.size)])
        scene = sample_scene(rng, self.objects)
        words = int(rng.integers(self.words[0], self.words[1] + 1))
        style = STYLES[int(rng.integers(len(STYLES)))] if self.style == "mixed" else self.style
        return scene, describe(scene, rng, words=words, style=style)


class ScenePairs(Data):
    """Pairs of imperfect images for each scene's caption, with the fraction of people who prefer the first.

    An item is ``{"prompt": str, "image": (2, 3, 64, 64), "preference": ()}``. With ``captions=True``, it also has
    ``captions``, one text per image.

    Args:
        scenes: scenes and captions.
        truth_weight: weight of faithfulness to the caption, see `longalign.mini.preferences.preference`.
        taste_weight: weight of the taste.
        captions: whether items have a caption of each image, as long as the prompt.
    """

    def __init__(self, scenes: Scenes, truth_weight: float = 10.0, taste_weight: float = 4.0, captions: bool = False):
        self.scenes, self.captions = scenes, captions
        self.truth_weight, self.taste_weight = truth_weight, taste_weight

    @classmethod
    def from_config(cls, config: ScenePairsConfig, runtime: Runtime) -> ScenePairs:
        scenes = Scenes.from_config(config, runtime)
        return cls(scenes, config.truth_weight, config.taste_weight, config.captions)

    def __len__(self) -> int:
        return len(self.scenes)

    def prompt(self, index: int) -> str:
        return self.scenes.prompt(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scenes, caption = self.pair(index)
        preferred = torch.tensor(preference(*scenes, caption, self.truth_weight, self.taste_weight))
        item = {"prompt": caption.text, "image": torch.from_numpy(render_batch(scenes)), "preference": preferred}
        if self.captions:
            rng = self._rng(index, 1)
            item["captions"] = tuple(describe(s, rng, words=caption.num_words).text for s in scenes)
        return item

    def pair(self, index: int) -> tuple[tuple[Scene, Scene], Caption]:
        """Scenes of both images of item ``index``, and their common caption."""
        scene, caption = self.scenes.scene(index)
        rng = self._rng(index, 0)
        return (vary(scene, rng), vary(scene, rng)), caption

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.scenes.seed, check_index(index, len(self)), 1 + stream])
