"""Limits the memory of the graphs that a rollout keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GraphBudget:
    """Memory for the graphs of network calls with gradient.

    A call may keep its graph if the largest graph so far still fits. The first call may always, because its size is
    unknown.

    Args:
        size: bytes of all graphs.
        weights: tensors that do not count, because they exist without a graph.
    """

    def __init__(self, size: float, weights: Iterable[Tensor] = ()):
        self.size, self.used, self._largest = size, 0, 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}

    def allows(self) -> bool:
        """Whether the next call may keep its graph."""
        return self.used + self._largest <= self.size

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context manager that counts the tensors saved for the backward pass, each storage once."""
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        size = sum(sizes.values())
        self.used, self._largest = self.used + size, max(self._largest, size)
