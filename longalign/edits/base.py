"""Interface of edits: functions of a reward's text embedding, ``s = C_X(x) . f(C_P)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from longalign.registry import PartConfig
from longalign.rewards.base import EmbeddingReward


@dataclass(frozen=True)
class EditedText:
    """Edited text embeddings of a batch, and what to log about them.

    Attributes:
        text: ``(b, d)`` edited embeddings ``f(C_P)``.
        along: named embeddings, ``(b, d)`` or ``(d,)``; their dot products with the image embeddings are logged.
        values: named ``(b,)`` values to log.
    """

    text: Tensor
    along: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


class Edit(nn.Module):
    """Base class of edits.

    An edit has no trainable parameters. It may have state in buffers, which is saved with the run. The state changes in
    training mode only, and in the same way in all processes (`Runtime.gather`).
    """

    #: whether the edited embedding depends on the common direction, so that a batch without one is an error
    needs_direction: bool = False

    def forward(
        self, text: Tensor, prompts: Sequence[str], reward: EmbeddingReward, direction: Tensor | None
    ) -> EditedText:
        """Edits the text embeddings of a batch.

        Args:
            text: ``(b, d)`` embeddings ``C_P`` of the prompts; not to be modified in place.
            prompts: b prompts.
            reward: the reward whose embeddings are edited, e.g. to embed further texts.
            direction: the common direction ``V``, a unit vector ``(d,)``; None if the prompts have none. Never None if
                `needs_direction`.
        """
        raise NotImplementedError

    def check_reward(self, reward: EmbeddingReward, config: PartConfig | None = None) -> None:
        """Checks that the edit fits a reward. It is called once, when both are built; the default accepts all.

        Args:
            reward: the reward whose embeddings will be edited.
            config: its config, for messages.

        Raises:
            ValueError: if the edit does not fit.
        """
