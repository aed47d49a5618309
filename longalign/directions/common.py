"""The common direction of text embeddings, estimated from the prompts of a run (LongAlign, paper 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longalign.functional import preference

_HINT = "use `direction: running`, or a file written by `longalign compute-direction`"


class UndefinedDirection(ValueError):
    """Raised if a common direction cannot be computed.

    Either a batch has fewer than two different prompts, or a running mean contains no prompt yet.
    """


class CommonDirection(nn.Module):
    """The common direction ``V`` of text embeddings: their normalized mean (LongAlign, paper 3.2).

    Args:
        source: ``"batch"`` for the mean over each batch, ``"running"`` for the mean over all batches passed to
            `forward` with ``update=True`` so far, or a fixed vector ``(d,)`` of any norm. The ``state_dict`` of a
            running direction contains ``running_mean`` ``(d,)`` and ``running_count``, the number of embeddings.
        dim: width ``d`` of the embeddings.
        gather: `Runtime.gather`, by which ``V`` is computed from the embeddings of all processes.

    Raises:
        ValueError: if ``source`` is none of these.
    """

    running_mean: Tensor
    running_count: Tensor
    fixed: Tensor

    def __init__(self, source: str | Tensor, dim: int, gather: Callable[[Any], Any]):
        super().__init__()
        self.gather = gather
        self.mode = source if isinstance(source, str) else "fixed"
        if self.mode == "running":
            self.register_buffer("running_mean", torch.zeros(dim))
            self.register_buffer("running_count", torch.zeros((), dtype=torch.long))
        elif self.mode == "fixed":
            assert isinstance(source, Tensor)
            if source.shape != (dim,):
                raise ValueError(
                    f"expected a direction of shape ({dim},), the reward's width, got {tuple(source.shape)}; compute "
                    "a direction for this reward with `longalign compute-direction`"
                )
            # not persistent: it is reloaded from its file
            self.register_buffer("fixed", nn.functional.normalize(source.float(), dim=0), persistent=False)
        elif self.mode != "batch":
            raise ValueError(f"direction must be 'batch', 'running' or a vector, not '{self.mode}'; pass one of these")

    def forward(self, text: Tensor, update: bool) -> Tensor:
        """Returns ``V``, a vector ``(d,)`` of norm 1 without gradient.

        All processes must call this method together, with the same ``update``.

        Args:
            text: ``(b, d)`` text embeddings of this process's part of the batch.
            update: whether to add the embeddings to the mean of the source ``"running"``; no effect for other sources.

        Raises:
            UndefinedDirection: with the source ``"batch"``, if the batch of all processes has fewer than two different
                prompts, because no component orthogonal to ``V`` would be left. With the source ``"running"``, if there
                was no update yet.
        """
        if self.mode == "fixed":
            return self.fixed.to(text.device)
        if self.mode == "running":
            return self._running(text, update)
        gathered = self.gather(text.detach())
        if len(gathered) < 2 or torch.allclose(gathered, gathered[:1].expand_as(gathered), rtol=0, atol=1e-6):
            raise UndefinedDirection(
                f"the common direction of a batch needs at least 2 different prompts, got "
                f"{len(gathered)} {'prompt' if len(gathered) == 1 else 'times the same prompt'} over all processes: "
                f"the text-relevant part would be zero; {_HINT}"
            )
        return preference.common_direction(gathered)

    def _running(self, text: Tensor, update: bool) -> Tensor:
        if update:
            gathered = self.gather(text.detach()).to(self.running_mean)
            mean, count = preference.running_mean(self.running_mean, self.running_count, gathered)
            self.running_mean.copy_(mean)
            self.running_count.copy_(count)
        elif not self.running_count:
            raise UndefinedDirection(
                "the running direction has no prompts yet; score in training mode first, or set the "
                "direction to a file of `longalign compute-direction`"
            )
        return preference.normalize(self.running_mean).to(text.device)
