"""Pairs of synthetic scenes with a preference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longalign.data.base import Data, check_index
from longalign.data.scenes.config import ScenePairsConfig
from longalign.data.scenes.scenes import Scenes
from longalign.mini.captions import Caption, describe
from longalign.mini.preferences import preference, vary
from longalign.mini.scenes import Scene, render_batch
from longalign.runtime import Runtime


class ScenePairs(Data):
    """Dataset of pairs of images with a simulated preference.

    An item is ``{"prompt": str, "image": float32 (2, 3, 64, 64) in [0, 1], "preference": float32 ()}``. Both images
    show one synthetic scene, with errors and with different light, see `longalign.mini.preferences.vary`. The
    preference is the fraction of people who prefer the first image, from 0 to 1, see
    `longalign.mini.preferences.preference`.

    Args:
        scenes: dataset of the scenes without errors; their captions are the prompts.
        truth_weight: weight of the faithfulness of an image to the prompt in the preference, at least 0.
        taste_weight: weight of the taste, which does not depend on the prompt, in the preference, at least 0.
        captions: whether an item also has ``"captions"``: two texts, a true caption of each image with about as many
            words as the prompt.
    """

    def __init__(self, scenes: Scenes, *, truth_weight: float, taste_weight: float, captions: bool):
        self.scenes, self.captions = scenes, captions
        self.truth_weight, self.taste_weight = truth_weight, taste_weight

    @classmethod
    def from_config(cls, config: ScenePairsConfig, runtime: Runtime) -> ScenePairs:
        return cls(
            Scenes.from_config(config, runtime),
            truth_weight=config.truth_weight,
            taste_weight=config.taste_weight,
            captions=config.captions,
        )

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
            item["captions"] = tuple(
                describe(s, rng, words=caption.num_words, filler=self.scenes.filler).text for s in scenes
            )
        return item

    def pair(self, index: int) -> tuple[tuple[Scene, Scene], Caption]:
        """Returns the scenes of the two images of item ``index``, and the caption that is the prompt of both images."""
        scene, caption = self.scenes.scene(index)
        rng = self._rng(index, 0)
        return (vary(scene, rng), vary(scene, rng)), caption

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.scenes.seed, check_index(index, len(self)), 1 + stream])
