"""Reweighted rewards: the text-irrelevant part of a preference score scaled by omega (LongAlign, paper section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longalign import preference, registry
from longalign.rewards.base import EmbeddingReward, Reward, Scores, check_pairs
from longalign.rewards.direction import load_direction
from longalign.runtime import Runtime

if TYPE_CHECKING:
    from longalign.rewards.configs import ReweightedConfig

_HINT = "use `direction: running`, or a file written by `longalign direction`"


class ReweightedReward(Reward):
    """``C_X . (C_P_perp + omega eta V)``, with both parts of the plain score beside it.

    `Scores.parts` are ``text_relevant`` (``C_X . C_P_perp``), ``text_irrelevant`` (``C_X . eta V``) and ``eta``.

    Args:
        inner: the reward that is taken apart.
        omega: weight of the text-irrelevant part.
        direction: ``"batch"``, ``"running"``, or a fixed unit vector ``(d,)``. A running direction is the mean over
            all prompts seen in training mode; eval mode uses it and leaves it as it is. Its state is part of
            ``state_dict()`` (``running_mean``, ``running_count``).
        gather: see `Runtime.gather`; V is that of the prompts of all processes.
    """

    running_mean: Tensor
    running_count: Tensor
    fixed: Tensor

    def __init__(
        self,
        inner: EmbeddingReward,
        omega: float = 0.3,
        direction: str | Tensor = "batch",
        gather: Callable[[Any], Any] = Runtime.gather,
    ):
        super().__init__()
        self.inner, self.omega, self.gather = _checked(inner), omega, gather
        self.mode = direction if isinstance(direction, str) else "fixed"
        if self.mode == "running":
            self.register_buffer("running_mean", torch.zeros(inner.dim))
            self.register_buffer("running_count", torch.zeros((), dtype=torch.long))
        elif self.mode == "fixed":
            assert isinstance(direction, Tensor)
            if direction.shape != (inner.dim,):
                raise ValueError(
                    f"expected a direction ({inner.dim},), the reward's width, got {tuple(direction.shape)}"
                )
            # it comes from its file again, so checkpoints need not carry it
            self.register_buffer("fixed", torch.nn.functional.normalize(direction.float(), dim=0), persistent=False)
        elif self.mode != "batch":
            raise ValueError(f"direction must be 'batch', 'running' or a vector, not '{self.mode}'")

    def direction(self, text: Tensor) -> Tensor:
        """``V (d,)`` for a batch of text embeddings ``(b, d)`` of this process.

        Raises:
            ValueError: for a batch direction of fewer than two different prompts: V would be the prompt itself and
                nothing text-relevant would remain; for a running direction in eval mode before any training.
        """
        if self.mode == "fixed":
            return self.fixed.to(text.device)
        if self.mode == "running":
            return self._running(text)
        gathered = self.gather(text.detach())
        if len(gathered) < 2 or torch.allclose(gathered, gathered[:1].expand_as(gathered), rtol=0, atol=1e-6):
            raise ValueError(
                f"the common direction of a batch needs two different prompts at least, and this batch has "
                f"{len(gathered)} {'prompt' if len(gathered) == 1 else 'times the same prompt'} over all processes: "
                f"its text-relevant part would vanish; {_HINT}"
            )
        return preference.common_direction(gathered)

    def _running(self, text: Tensor) -> Tensor:
        if self.training:
            gathered = self.gather(text.detach()).to(self.running_mean)
            mean, count = preference.running_mean(self.running_mean, self.running_count, gathered)
            self.running_mean.copy_(mean)
            self.running_count.copy_(count)
        elif not self.running_count:
            raise ValueError("a running direction has seen no prompts yet: score in training mode first, or use a file")
        return preference.normalise(self.running_mean).to(text.device)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        text = self.inner.text_features(prompts)
        direction = self.direction(text)
        image = self.inner.image_features(images)
        total = (image * preference.reweight(text, direction, self.omega)).sum(-1)
        parts = preference.decompose(image.detach(), text, direction)
        return Scores(
            total, {"text_relevant": parts.relevant, "text_irrelevant": parts.irrelevant, "eta": parts.eta}
        ).checked(images, prompts)


def load_reweighted(config: ReweightedConfig, runtime: Runtime) -> ReweightedReward:
    """Builds the inner reward and wraps it; a direction file is checked against the inner reward."""
    inner = _checked(registry.rewards.build(config.inner, runtime))
    direction: str | Tensor = config.direction
    if direction not in ("batch", "running"):
        direction = load_direction(config.direction).vector_for(inner, config.inner)
    reward = ReweightedReward(inner, config.omega, direction, runtime.gather)
    return reward.to(runtime.device)


def _checked(inner: Any) -> EmbeddingReward:
    if not isinstance(inner, EmbeddingReward):
        raise ValueError(
            f"reweighted needs a reward that is a product of embeddings (an EmbeddingReward), not "
            f"{type(inner).__name__}; around a sum, put `reweighted` inside it, around each term"
        )
    return inner
