"""Configs of the synthetic scenes. Importing this module does not import torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from longalign.data.config import DataConfig

HELD_OUT = 1_000_000
"""Offset from the seed of training data to the seed of held-out data."""
NumObjects = Annotated[int, Field(ge=0, le=9)]


class SyntheticConfig(DataConfig):
    """Base class of configs of synthetic scenes."""

    size: PositiveInt = 10_000
    """number of scenes. Seed and index determine a scene."""
    seed: NonNegativeInt = 0
    """random seed of the scenes. Use different seeds for training and held-out sets."""
    objects: tuple[NumObjects, NumObjects] = (1, 9)
    """lowest and highest number of objects in a scene, between 0 and 9."""
    words: tuple[PositiveInt, PositiveInt] = (20, 250)
    """lowest and highest target length of a caption in words; lengths are uniform in between."""
    style: Literal["plain", "referring", "mixed"] = "plain"
    """caption style: "plain" (self-contained sentences), "referring" ("It is red."), or "mixed" (both, equally often).
    """
    filler: bool = False
    """whether captions that state every fact of their scene in fewer words than their target length are filled up to it
    with sentences that state no fact. Without filler, captions end at about 750 words.
    """

    def held_out(self, count: int) -> Self:
        return self.model_copy(update={"size": count, "seed": self.seed + HELD_OUT})

    @field_validator("objects", "words")
    @classmethod
    def _check_range(cls, value: tuple[int, int], info: ValidationInfo) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError(f"{info.field_name} must be [lowest, highest], got {list(value)}")
        return value


class ScenesConfig(SyntheticConfig):
    """Synthetic scenes with captions of configurable length, rendered on demand."""

    target: ClassVar[str] = "longalign.data.scenes.scenes:Scenes"

    name: Literal["scenes"] = "scenes"


class ScenePairsConfig(SyntheticConfig):
    """Pairs of synthetic scenes for training preference models.

    Both images show the scene of the caption with some wrong facts and different lighting. The fraction of people who
    prefer the first image depends on faithfulness to the caption and on a caption-independent taste.
    """

    target: ClassVar[str] = "longalign.data.scenes.pairs:ScenePairs"
    has_pairs: ClassVar[bool] = True

    name: Literal["scene-pairs"] = "scene-pairs"
    truth_weight: float = Field(10.0, ge=0)
    """weight of the difference in truth, the fraction of the caption's facts that an image shows. The preference is
    the sigmoid of the sum of both weighted differences.
    """
    taste_weight: float = Field(4.0, ge=0)
    """weight of the difference in taste. Taste is a score from -1 to 1; warm light and dark corners score high."""
    captions: bool = False
    """whether each image also has its own caption, as long as the prompt."""
