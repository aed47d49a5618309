"""CUDA graphs of denoiser calls without gradient.

A graph launches all kernels of a call at once. Without it, the CPU launches thousands of kernels in each sampling step,
and a fast GPU waits for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from longalign.encoders.base import Conditioning
from longalign.functional.rollout_gradient import RandomState

Call = Callable[[Tensor, Tensor, Conditioning], Tensor]
#: runs a function without arguments; returns a function that repeats its operations in place, and its output tensor
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def capture_cuda_graph(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Captures a call as a CUDA graph; returns a function that replays it, and the tensor with a replay's result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output


class GraphedCall:
    """Wraps a denoiser call so that it is replayed as a CUDA graph, one graph for each set of input shapes.

    A graph reads the weights at the addresses that they had when it was captured. In-place changes, as by an optimizer,
    take effect; weights that are replaced or moved need a new `GraphedCall`. Calls with gradient, and calls that sample
    random numbers (dropout), run without a graph.

    Args:
        call: maps latents, timesteps and conditioning to the prediction.
        mode: returns the current mode as a hashable value, e.g. whether the denoiser is in training mode. Each mode has
            graphs of its own.
        capture: captures a graph; see `Capture`.
    """

    def __init__(self, call: Call, mode: Callable[[], Any], capture: Capture = capture_cuda_graph):
        self.call, self.mode, self.capture = call, mode, capture
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], None], Tensor] | None] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the prediction ``(b, c, h, w)`` for latents ``(b, c, h, w)`` at timesteps ``(b,)``, in a new tensor.

        The conditioning must not depend on the timestep.
        """
        if torch.is_grad_enabled():
            return self.call(latents, timesteps, conditioning)
        conditioning = replace(conditioning, reports=())
        values = {field.name: getattr(conditioning, field.name) for field in fields(conditioning)}
        inputs, structure = tree_flatten((latents, timesteps, values))
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        kind = latents.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shapes = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in inputs)
        key = (self.mode(), autocast, str(structure), shapes)
        if key not in self._graphs:
            static = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
            self._graphs[key] = self._captured(static, structure, conditioning)
        graph = self._graphs[key]
        if graph is None:
            return self.call(latents, timesteps, conditioning)
        static, replay, output = graph
        for target, source in zip(static, tensors, strict=True):
            target.copy_(source)
        replay()
        return output.clone()

    def _captured(
        self, inputs: list[Any], structure: Any, conditioning: Conditioning
    ) -> tuple[list[Tensor], Callable[[], None], Tensor] | None:
        latents, timesteps, values = tree_unflatten(inputs, structure)
        conditioning = replace(conditioning, **values)

        def call() -> Tensor:
            return self.call(latents, timesteps, conditioning)

        before = RandomState.now(latents.device)
        for _ in range(2):  # compilers and libraries allocate workspaces in the first calls
            call()
        if not before.is_current():
            before.restore()
            return None
        return [value for value in inputs if isinstance(value, Tensor)], *self.capture(call)
