"""The edit `my-part`."""

from __future__ import annotations

from collections.abc import Sequence

from my_plugin.config import MyPartConfig
from torch import Tensor

from longalign.edits import Edit, EditedText
from longalign.rewards import EmbeddingReward
from longalign.runtime import Runtime


class MyPart(Edit):
    """Subtracts the embedding of a phrase from the text embedding ``C_P``: ``C_P - weight C_P(phrase)``.

    Args:
        phrase: the phrase, a text.
        weight: factor of the phrase's embedding.
    """

    def __init__(self, *, phrase: str, weight: float):
        super().__init__()
        self.phrase, self.weight = phrase, weight

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        """Builds the edit. Load files here."""
        return cls(phrase=config.phrase, weight=config.weight)

    def forward(
        self, text: Tensor, prompts: Sequence[str], reward: EmbeddingReward, direction: Tensor | None
    ) -> EditedText:
        """Edits text embeddings ``(b, d)``; the score of the image for the phrase is logged as ``phrase``."""
        phrase = reward.text_features([self.phrase])
        return EditedText(text - self.weight * phrase, {"phrase": phrase})
