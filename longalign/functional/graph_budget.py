"""Limits the memory of the autograd graphs that a rollout (sampling with gradient) keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GraphBudget:
    """Decides which network calls with gradient may keep their autograd graphs, within a limit of memory.

    A call may keep its graph if a graph as large as the largest one so far still fits. The first call always may,
    because the size of its graph is unknown.

    Args:
        size: limit of the memory of all graphs together, in bytes.
        weights: tensors that a graph refers to but that are not counted, such as the network's weights.

    Attributes:
        used: memory of all graphs so far, in bytes.
    """

    def __init__(self, size: float, weights: Iterable[Tensor] = ()):
        self.size, self.used, self._largest = size, 0, 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}

    def allows(self) -> bool:
        """Whether the next network call may keep its graph."""
        return self.used + self._largest <= self.size

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context manager for one network call: adds to ``used`` the memory of the tensors that autograd saves."""
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
