"""Interface of edits: functions ``f`` of a reward's text embedding.

The edited score of image ``x`` and prompt ``p`` is ``C_X(x) . f(C_P(p))``, with image embedding ``C_X`` and text
embedding ``C_P`` of the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from longalign.registry import PartConfig
from longalign.rewards.base import EmbeddingReward


@dataclass(frozen=True)
class EditedText:
    """Edited text embeddings of a batch of b prompts, and what to log about them.

    Attributes:
        text: ``(b, d)`` edited embeddings.
        along: name -> embeddings ``(b, d)`` or embedding ``(d,)``. The dot product with the image embedding is logged
            under the name.
        values: name -> values ``(b,)`` to log.
    """

    text: Tensor
    along: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


class Edit(nn.Module):
    """Base class of edits, functions of a reward's text embedding.

    An edit has no trainable parameters. It may have buffers, which are saved for resuming. Buffers may change in
    training mode only, and must stay equal in all processes; compute them from tensors gathered by `Runtime.gather`.
    """

    #: whether the edited embedding depends on the common direction of text embeddings; then a batch without a common
    #: direction is an error
    needs_direction: bool = False

    def forward(
        self, text: Tensor, prompts: Sequence[str], reward: EmbeddingReward, direction: Tensor | None
    ) -> EditedText:
        """Edits the text embeddings of a batch; returns the edited embeddings and what to log.

        Args:
            text: ``(b, d)`` text embeddings of the prompts; must not be modified in place.
            prompts: b prompts.
            reward: the reward whose embeddings are edited, e.g. to embed further texts.
            direction: the common direction of text embeddings, a unit vector ``(d,)``; None if it is undefined, as for
                a batch with one prompt. Never None if the edit's attribute `needs_direction` is True.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def check_reward(self, reward: EmbeddingReward, config: PartConfig | None = None) -> None:
        """Checks that the edit fits a reward. Called once, after both are built; the base class accepts all.

        Args:
            reward: the reward whose embeddings will be edited.
            config: config of the reward, for messages; None if the reward has no config.

        Raises:
            ValueError: if the edit does not fit the reward.
        """
