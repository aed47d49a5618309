"""Configs of the synthetic scenes. Importing this module does not import torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from longalign.data.config import DataConfig

HELD_OUT = 1_000_000
"""Offset from the seed of training data to the seed of held-out data."""
NumObjects = Annotated[int, Field(ge=0, le=9)]


class SyntheticConfig(DataConfig):
    """Base class of configs of synthetic scenes: images of coloured objects on a three by three grid, with captions."""

    size: PositiveInt = 10_000
    """number of items. The seed and the index of an item determine its scene."""
    seed: NonNegativeInt = 0
    """random seed of the scenes. Use different seeds for training and held-out sets."""
    objects: tuple[NumObjects, NumObjects] = (1, 9)
    """lowest and highest number of objects in a scene, each from 0 to 9. The number is uniformly distributed."""
    words: tuple[PositiveInt, PositiveInt] = (20, 250)
    """lowest and highest target length of a caption in words. Target lengths are uniformly distributed. Without
    ``filler``, captions of scenes with few objects can be shorter.
    """
    style: Literal["plain", "referring", "mixed"] = "plain"
    """caption style: "plain" (self-contained sentences), "referring" (sentences with pronouns, such as "It is red."),
    or "mixed" (each caption is one of the two, equally often).
    """
    filler: bool = False
    """whether a caption that states every fact of its scene in fewer words than its target length is extended to this
    length with sentences that state no fact. Without them, captions have at most about 750 words.
    """

    def held_out(self, count: int) -> Self:
        return self.model_copy(update={"size": count, "seed": self.seed + HELD_OUT})

    @field_validator("objects", "words")
    @classmethod
    def _check_range(cls, value: tuple[int, int], info: ValidationInfo) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError(f"{info.field_name} must be [lowest, highest], got {list(value)}; swap the numbers")
        return value


class ScenesConfig(SyntheticConfig):
    """Synthetic scenes with captions of configurable length, rendered on demand."""

    target: ClassVar[str] = "longalign.data.scenes.scenes:Scenes"

    name: Literal["scenes"] = "scenes"


class ScenePairsConfig(SyntheticConfig):
    """Pairs of synthetic scenes for training preference models.

    Both images of a pair show the scene of one caption, with some wrong facts and different lighting. A fact is, for
    example, the colour of an object. The fraction of people who prefer the first image is simulated as
    ``sigmoid(truth_weight * (truth_0 - truth_1) + taste_weight * (taste_0 - taste_1))``, with the truth and the taste
    of image 0, the first one, and image 1.
    """

    target: ClassVar[str] = "longalign.data.scenes.pairs:ScenePairs"
    has_pairs: ClassVar[bool] = True

    name: Literal["scene-pairs"] = "scene-pairs"
    truth_weight: float = Field(10.0, ge=0)
    """weight of the difference in truth between the two images. Truth is the fraction of the caption's facts that an
    image shows, from 0 to 1.
    """
    taste_weight: float = Field(4.0, ge=0)
    """weight of the difference in taste between the two images. Taste is a score from -1 to 1 that does not depend on
    the caption: warm light and dark corners score high.
    """
    captions: bool = False
    """whether items also have a true caption of each image, of about as many words as the prompt."""
