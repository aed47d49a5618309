"""The edit `pairs` of a reward's text embedding: compares a positive and a negative variant of a prompt (SRPO)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longalign.edits.base import Edit, EditedText
from longalign.edits.config import PairsEditConfig
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import Runtime


class PairsEdit(Edit):
    """Edit that compares a prompt with a positive and a negative control word (SRPO, arXiv 2509.06942).

    The edited embedding is ``(k + 1) C_P(positive prompt) - C_P(negative prompt)`` with the reward's text embedding
    ``C_P``. The scores of the two prompts are logged as ``positive`` and ``negative``; the edited score is
    ``k * positive + (positive - negative)``.

    Args:
        positive: control word of the positive prompt, put before each text that the reward encodes; may be empty.
        negative: control word of the negative prompt; may be empty.
        k: weight of the positive prompt's score, which is added to the difference of the two scores.
    """

    def __init__(self, *, positive: str, negative: str, k: float):
        super().__init__()
        self.positive, self.negative, self.k = positive, negative, k

    @classmethod
    def from_config(cls, config: PairsEditConfig, runtime: Runtime) -> PairsEdit:
        return cls(positive=config.positive, negative=config.negative, k=config.k)

    def forward(
        self, text: Tensor, prompts: Sequence[str], reward: EmbeddingReward, direction: Tensor | None
    ) -> EditedText:
        words = (self.positive, self.negative)
        positive, negative = (reward.prefixed_features(prompts, w) if w.strip() else text for w in words)
        return EditedText((self.k + 1) * positive - negative, {"positive": positive, "negative": negative})
