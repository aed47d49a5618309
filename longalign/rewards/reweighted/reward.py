"""Reweighted rewards: the text-irrelevant part of a preference score scaled by omega (LongAlign, paper section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longalign import registry
from longalign.functional import preference
from longalign.rewards.base import EmbeddingReward, Reward, Scores, check_pairs
from longalign.rewards.reweighted.config import ReweightedConfig
from longalign.rewards.reweighted.direction import load_direction
from longalign.runtime import Runtime

_HINT = "use `direction: running`, or a file written by `longalign compute-direction`"


class ReweightedReward(Reward):
    """The reweighted score ``C_X . (C_P_perp + omega eta V)`` of an embedding reward.

    `Scores.parts` contain the parts of the original score: ``text_relevant`` (``C_X . C_P_perp``), ``text_irrelevant``
    (``C_X . eta V``) and ``eta``. See `longalign.functional.preference` for the symbols.

    Args:
        inner: the reward to decompose.
        omega: weight of the text-irrelevant part.
        direction: ``"batch"``, ``"running"``, or a fixed vector ``(d,)``, which is normalized. A running direction is
            computed from all prompts scored in training mode; eval mode does not update it. The ``state_dict`` contains
            ``running_mean`` and ``running_count``.
        gather: see `Runtime.gather`; V is computed from the prompts of all processes.
    """

    running_mean: Tensor
    running_count: Tensor
    fixed: Tensor

    def __init__(self, inner: EmbeddingReward, *, omega: float, direction: str | Tensor, gather: Callable[[Any], Any]):
        super().__init__()
        self.inner, self.omega, self.gather = _require_embedding_reward(inner), omega, gather
        self.mode = direction if isinstance(direction, str) else "fixed"
        if self.mode == "running":
            self.register_buffer("running_mean", torch.zeros(inner.dim))
            self.register_buffer("running_count", torch.zeros((), dtype=torch.long))
        elif self.mode == "fixed":
            assert isinstance(direction, Tensor)
            if direction.shape != (inner.dim,):
                raise ValueError(
                    f"expected a direction of shape ({inner.dim},), the reward's width, got {tuple(direction.shape)}"
                )
            # not persistent: it is reloaded from its file
            self.register_buffer("fixed", torch.nn.functional.normalize(direction.float(), dim=0), persistent=False)
        elif self.mode != "batch":
            raise ValueError(f"direction must be 'batch', 'running' or a vector, got '{self.mode}'")

    @classmethod
    def from_config(cls, config: ReweightedConfig, runtime: Runtime) -> ReweightedReward:
        """Builds the inner reward and checks that a direction file was computed with it."""
        inner = _require_embedding_reward(registry.rewards.build(config.inner, runtime))
        direction: str | Tensor = config.direction
        if direction not in ("batch", "running"):
            direction = load_direction(config.direction).vector_for(inner, config.inner)
        return cls(inner, omega=config.omega, direction=direction, gather=runtime.gather).to(runtime.device)

    def direction(self, text: Tensor) -> Tensor:
        """Returns ``V``, shape ``(d,)``, for a batch of text embeddings ``(b, d)`` of this process.

        Raises:
            ValueError: if a batch has fewer than two different prompts, because the text-relevant part would then be
                zero. Also if a running direction is used in eval mode before any training.
        """
        if self.mode == "fixed":
            return self.fixed.to(text.device)
        if self.mode == "running":
            return self._running(text)
        gathered = self.gather(text.detach())
        if len(gathered) < 2 or torch.allclose(gathered, gathered[:1].expand_as(gathered), rtol=0, atol=1e-6):
            raise ValueError(
                f"the common direction of a batch needs at least 2 different prompts, got "
                f"{len(gathered)} {'prompt' if len(gathered) == 1 else 'times the same prompt'} over all processes: "
                f"the text-relevant part would be zero; {_HINT}"
            )
        return preference.common_direction(gathered)

    def _running(self, text: Tensor) -> Tensor:
        if self.training:
            gathered = self.gather(text.detach()).to(self.running_mean)
            mean, count = preference.running_mean(self.running_mean, self.running_count, gathered)
            self.running_mean.copy_(mean)
            self.running_count.copy_(count)
        elif not self.running_count:
            raise ValueError("the running direction has no prompts yet; score in training mode first, or use a file")
        return preference.normalize(self.running_mean).to(text.device)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        text = self.inner.text_features(prompts)
        direction = self.direction(text)
        image = self.inner.image_features(images)
        total = (image * preference.reweight(text, direction, self.omega)).sum(-1)
        parts = preference.decompose(image.detach(), text, direction)
        return Scores(
            total, {"text_relevant": parts.relevant, "text_irrelevant": parts.irrelevant, "eta": parts.eta}
        ).checked(images, prompts)


def _require_embedding_reward(inner: Any) -> EmbeddingReward:
    if not isinstance(inner, EmbeddingReward):
        raise ValueError(
            f"reweighted requires a reward that is a dot product of embeddings (an EmbeddingReward), got "
            f"{type(inner).__name__}; to reweight a sum, wrap each of its terms in `reweighted`"
        )
    return inner
