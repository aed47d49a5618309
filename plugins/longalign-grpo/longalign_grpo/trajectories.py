"""The last rollout, which is part of the state of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Trajectories(nn.Module):
    """Sampled trajectories that are still needed for updates, as buffers.

    Buffers are saved with the run, so that a run resumed between two updates uses the same trajectories.

    Attributes:
        latents: ``(steps + 1, n, c, h, w)`` latents before each sampling step, and the final ones.
        advantages: ``(n,)``.
        steps: ``(k,)`` indices of the trained steps.
        log_probs: ``(k, n)`` log-probabilities of these steps when they were sampled; NaN before the first update.
        texts: the prompts as JSON in bytes.
        num_updates: number of updates so far.
    """

    latents: Tensor
    advantages: Tensor
    steps: Tensor
    log_probs: Tensor
    texts: Tensor
    num_updates: Tensor

    def store(self, prompts: Sequence[str], latents: Tensor, advantages: Tensor, steps: Tensor) -> None:
        """Replaces the trajectories."""
        tensors = {
            "latents": latents,
            "advantages": advantages,
            "steps": steps,
            "log_probs": advantages.new_full((len(steps), len(advantages)), torch.nan),
            "texts": torch.tensor(list(json.dumps(list(prompts)).encode()), dtype=torch.uint8),
            "num_updates": torch.tensor(0),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def clear(self) -> None:
        """Removes the trajectories."""
        self._buffers.clear()

    def is_empty(self) -> bool:
        """Whether there are no trajectories."""
        return not self._buffers

    @property
    def prompts(self) -> list[str]:
        """The prompts, one for each group."""
        return json.loads(bytes(self.texts.tolist()))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Replaces the trajectories by those of a checkpoint, which have any shape."""
        self.clear()
        for key, tensor in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key.removeprefix(prefix), tensor.clone())
