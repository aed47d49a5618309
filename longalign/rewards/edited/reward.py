"""Rewards ``C_X . f(C_P)``, where a function f changes the text embedding; ``C_X`` is the image embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from longalign import registry
from longalign.directions.common import CommonDirection, UndefinedDirection
from longalign.directions.file import load_direction
from longalign.edits.base import Edit
from longalign.functional import preference
from longalign.rewards.base import EmbeddingReward, Reward, Scores, check_pairs
from longalign.rewards.edited.config import EditedConfig, ReweightedConfig
from longalign.runtime import Runtime


class EditedReward(Reward):
    """The score ``C_X . f(C_P)`` of an embedding reward, with an edit ``f`` of the text embedding.

    ``C_X`` is the image embedding and ``C_P`` the text embedding of `EmbeddingReward`. `Scores.parts` contain the
    decomposition of the original score ``C_X . C_P`` along the common direction ``V``: ``text_relevant``
    (``C_X . C_P_perp``), ``text_irrelevant`` (``C_X . eta V``) and ``eta``, see `longalign.functional.preference`.
    These three do not depend on the edit, and are omitted if the prompts have no common direction but the edit works
    without it. ``edit_norm`` is the norm of ``f(C_P)``, which is the gradient of the score with respect to ``C_X``. The
    edit may add further parts.

    Args:
        inner: the reward whose text embedding is edited.
        edit: the edit ``f``.
        direction: source of ``V``: ``"batch"``, ``"running"`` or a vector ``(d,)``; see `CommonDirection`. A running
            direction is updated in training mode only.
        gather: `Runtime.gather`, by which ``V`` is computed from the prompts of all processes.
    """

    def __init__(self, inner: EmbeddingReward, *, edit: Edit, direction: str | Tensor, gather: Callable[[Any], Any]):
        super().__init__()
        self.inner, self.edit = _require_embedding_reward(inner), edit
        self.common = CommonDirection(direction, inner.dim, gather)

    @classmethod
    def from_config(cls, config: EditedConfig | ReweightedConfig, runtime: Runtime) -> EditedReward:
        """Builds the inner reward and the edit, and reads the direction files of the config.

        Raises:
            ValueError: if the inner reward is not an `EmbeddingReward`, or a direction file is missing or was computed
                with a different reward.
        """
        inner = _require_embedding_reward(registry.rewards.build(config.inner, runtime))
        edit = registry.edits.build(config.edit, runtime)
        edit.check_reward(inner, config.inner)
        direction: str | Tensor = config.direction
        if direction not in ("batch", "running"):
            direction = load_direction(config.direction).common_for(inner, config.inner)
        return cls(inner, edit=edit, direction=direction, gather=runtime.gather).to(runtime.device)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        text = self.inner.text_features(prompts)
        try:
            direction = self.common(text, self.training)
        except UndefinedDirection:
            if self.edit.needs_direction:
                raise
            direction = None
        edited = self.edit(text, prompts, self.inner, direction)
        if edited.text.shape != text.shape:
            raise ValueError(
                f"{type(self.edit).__name__} returned text embeddings of shape {tuple(edited.text.shape)}; expected "
                f"{tuple(text.shape)}, the shape of its argument `text`"
            )
        image = self.inner.image_features(images)
        total = (image * edited.text).sum(-1)
        image, parts = image.detach(), {}
        if direction is not None:
            found = preference.decompose(image, text, direction)
            parts = {"text_relevant": found.relevant, "text_irrelevant": found.irrelevant, "eta": found.eta}
        parts["edit_norm"] = edited.text.norm(dim=-1)
        parts |= {name: (image * row).sum(-1) for name, row in edited.along.items()}
        return Scores(total, {k: v.detach() for k, v in (parts | edited.values).items()}).checked(images, prompts)


def _require_embedding_reward(inner: Any) -> EmbeddingReward:
    if not isinstance(inner, EmbeddingReward):
        raise ValueError(
            f"expected a reward that is a dot product of embeddings (an EmbeddingReward), got {type(inner).__name__}; "
            "use a reward such as 'clip' or 'denscore', and for a sum edit each of its terms"
        )
    return inner
