"""Storage of the last samples of the trainer `grpo`, as part of the saved state of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Trajectories(nn.Module):
    """Stores the last samples, with their latents at all sampling steps, for several optimizer steps.

    The attributes are buffers, which are saved in checkpoints, so a resumed run uses the same samples.

    Attributes:
        latents: ``(num_steps + 1, n, c, h, w)`` latents of n images before each sampling step, then the final ones.
        advantages: ``(n,)`` advantages of the images; see `longalign_grpo.policy.group_advantages`.
        steps: ``(k,)`` int64 indices of the trained sampling steps.
        log_probs: ``(k, n)`` log-probabilities of these steps under the model that sampled them; NaN before the first
            optimizer step with these samples.
        texts: uint8, the prompts as JSON in UTF-8.
        num_updates: int64 ``()``, number of optimizer steps with these samples so far.
    """

    latents: Tensor
    advantages: Tensor
    steps: Tensor
    log_probs: Tensor
    texts: Tensor
    num_updates: Tensor

    def store(self, prompts: Sequence[str], latents: Tensor, advantages: Tensor, steps: Tensor) -> None:
        """Replaces the stored samples; ``prompts`` has one prompt per group. For the others see the attributes."""
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
        """Removes the stored samples."""
        self._buffers.clear()

    def is_empty(self) -> bool:
        """Whether no samples are stored."""
        return not self._buffers

    @property
    def prompts(self) -> list[str]:
        """The stored prompts, one for each group of images."""
        return json.loads(bytes(self.texts.tolist()))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Replaces the stored samples by those of a checkpoint, which may have different shapes."""
        self.clear()
        for key, tensor in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key.removeprefix(prefix), tensor.clone())
