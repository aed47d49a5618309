"""Configs of the rewards `edited` and `reweighted`. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.edits.config import DirectionConfig
from longalign.errors import ConfigProblem
from longalign.registry import Part
from longalign.rewards.config import RewardConfig


class InnerRewardConfig(RewardConfig):
    """Base class of the configs of rewards that change the text embedding of an inner reward.

    The score ``C_X . C_P`` of the inner reward, the dot product of image and text embedding, is decomposed along the
    common direction V, the normalized mean of text embeddings (LongAlign, paper 3.2 and 4). With ``C_P = C_P_perp + eta
    V``, ``C_X . C_P_perp`` is the text-relevant and ``C_X . eta V`` the text-irrelevant part. Both are logged.
    """

    target: ClassVar[str] = "longalign.rewards.edited.reward:EditedReward"

    inner: Part("rewards")
    """the reward whose text embedding is changed; its score must be a dot product of embeddings."""
    direction: str = "batch"
    """source of the common direction V, the normalized mean of text embeddings, along which the score is decomposed.
    ``"batch"`` computes V from the prompts of each batch over all processes, as in the paper; ``"running"`` from those
    of all training batches so far, including the current one. Otherwise the path of a file written by ``longalign
    compute-direction``.
    """

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: RewardConfig) -> RewardConfig:
        if not inner.embeds:
            raise ValueError(
                f"'{inner.name}' is not a dot product of embeddings, so it has no text embedding to edit and no "
                "text-irrelevant part; use a reward such as 'clip' or 'denscore', and for a sum edit each of its terms"
            )
        return inner

    def check_files(self) -> list[ConfigProblem]:
        if self.direction in ("batch", "running") or Path(self.direction).is_file():
            return []
        message = f"no file {self.direction}; expected batch, running, or a file written by `compute-direction`"
        return [("direction", message)]

    def is_differentiable(self) -> bool:
        return self.inner.is_differentiable()


class EditedConfig(InnerRewardConfig):
    """The score of the inner reward with a changed (edited) text embedding.

    The text-relevant and the text-irrelevant part of the unedited score are logged. ``direction`` selects the common
    direction that separates these two.
    """

    name: Literal["edited"] = "edited"
    edit: Part("edits")
    """how the text embedding is changed."""


class ReweightedConfig(InnerRewardConfig):
    """The score of the inner reward with its text-irrelevant part scaled by ``omega`` (LongAlign, paper section 4).

    The text-irrelevant part is ``C_X . eta V``, with the image embedding ``C_X`` and the component ``eta V`` of the
    text embedding along the common direction V, which the key ``direction`` selects. This reward equals the reward
    ``edited`` with the edit named ``direction``.
    """

    name: Literal["reweighted"] = "reweighted"
    omega: float = Field(0.3, ge=0, allow_inf_nan=False)
    """weight of the text-irrelevant part; 1: the original score, 0: only the text-relevant part. The paper uses
    0.3.
    """

    @property
    def edit(self) -> DirectionConfig:
        """Config of the edit of the text embedding: the edit named ``direction``, with the ``omega`` of this reward."""
        return DirectionConfig(omega=self.omega)
