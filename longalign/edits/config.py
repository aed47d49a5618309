"""Configs of edits, functions of a reward's text embedding. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from longalign.errors import ConfigProblem
from longalign.registry import PartConfig


class EditConfig(PartConfig):
    """Base class of the configs of edits, functions of a reward's text embedding."""


class NoEditConfig(EditConfig):
    """No edit: the reward ``edited`` gives the original score, and logs it under the names of edited scores."""

    target: ClassVar[str] = "longalign.edits.direction:DirectionEdit"
    omega: ClassVar[float] = 1.0
    file: ClassVar[str | None] = None

    name: Literal["none"] = "none"


class DirectionConfig(EditConfig):
    """Scales the component of the text embedding along the common direction of text embeddings.

    The source is LongAlign (arXiv 2410.11817, section 4). The reward's key ``direction`` sets the common direction.
    """

    target: ClassVar[str] = "longalign.edits.direction:DirectionEdit"
    file: ClassVar[str | None] = None

    name: Literal["direction"] = "direction"
    omega: float = Field(0.3, ge=0, allow_inf_nan=False)
    """factor of the component along the common direction. This component gives the text-irrelevant part of the score:
    preference for images regardless of the prompt. 1: the original score; 0: only the rest, the text-relevant part. The
    paper uses 0.3.
    """


class MeasuredConfig(EditConfig):
    """Scales the component of the text embedding along a measured direction, which is read from a file.

    This is the direction in which image embeddings moved when a model was over-optimized for the reward.
    """

    target: ClassVar[str] = "longalign.edits.direction:DirectionEdit"

    name: Literal["measured"] = "measured"
    file: str
    """path of the file with the measured direction, written by `longalign compute-direction --images`."""
    omega: float = Field(0.0, ge=0, allow_inf_nan=False)
    """factor of the component along the measured direction; 0 removes the component, 1 keeps the original score."""

    def check_files(self) -> list[ConfigProblem]:
        if Path(self.file).is_file():
            return []
        return [("file", f"no file {self.file}; write one with `longalign compute-direction --images`")]


class PairsEditConfig(EditConfig):
    """Relative preference between a positive and a negative variant of a prompt (SRPO, arXiv 2509.06942).

    The edited embedding is ``(k + 1) C_P(positive prompt) - C_P(negative prompt)``, with the text embedding ``C_P`` of
    the reward. The two prompts differ in a control word or phrase, which is put before every text that the reward
    encodes: the prompt, or each of its segments.
    """

    target: ClassVar[str] = "longalign.edits.pairs:PairsEdit"

    name: Literal["pairs"] = "pairs"
    positive: str
    """control word of the positive prompt: a word or phrase, separated from the text by a space; empty: none."""
    negative: str
    """control word of the negative prompt: a word or phrase that differs from ``positive``; empty: none."""
    k: float = Field(1.0, ge=0, allow_inf_nan=False)
    """weight with which the positive prompt's score is added to the difference of the two scores, positive minus
    negative; 0: only the difference.
    """

    @model_validator(mode="after")
    def _check_words(self) -> PairsEditConfig:
        if self.positive.split() == self.negative.split():
            raise ValueError(
                f"expected different control words as positive and negative, got {self.positive!r} for both; change one"
            )
        return self
