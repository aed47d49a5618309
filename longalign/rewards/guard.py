"""Checks of a reward's scores, and an error for non-finite scores that contains the image and its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longalign.errors import RunError


class NonFiniteReward(RunError):
    """Raised if a score is NaN or infinite, because the next optimizer step would corrupt the weights.

    Attributes:
        reward: name of the reward; empty if unknown.
        index: index in the batch of the first image with a non-finite score.
        prompt: the prompt of that image.
        image: that image ``(3, h, w)`` as it was scored, on the CPU and without gradient.
        scores: ``(b,)`` all scores of the batch, on the CPU.
    """

    def __init__(self, index: int, prompt: str, image: Tensor, scores: Tensor, reward: str = ""):
        self.index, self.prompt, self.image, self.scores, self.reward = index, prompt, image, scores, reward
        super().__init__(self._message())

    def _message(self, folder: Path | None = None) -> str:
        num_bad = int((~torch.isfinite(self.scores)).sum())
        pixels = "finite" if bool(torch.isfinite(self.image).all()) else "not finite either"
        prompt = self.prompt if len(self.prompt) <= 80 else self.prompt[:77] + "..."
        reward = f" of the reward '{self.reward}'" if self.reward else ""
        return (
            f"{num_bad} of {len(self.scores)} scores{reward} are not finite; "
            f"the first is {self.scores[self.index].item()} at index {self.index}, prompt {prompt!r}; "
            f"the image's pixels are {pixels}"
            + (f"; image, prompt and tensors were saved in {folder}" if folder else "")
        )

    def save(self, folder: str | Path) -> Path:
        """Writes ``image.png``, ``prompt.txt`` and ``tensors.safetensors`` (``image``, ``scores``) into a folder.

        Creates the folder if needed, adds its path to the message of this error, and returns the path. Non-finite
        pixels are black in the PNG and unchanged in the tensor.
        """
        from longalign.files.weights import save_tensors
        from longalign.image_io import write_png

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / "image.png", self.image.float().nan_to_num(0.0, 0.0, 0.0))
        (folder / "prompt.txt").write_text(self.prompt, encoding="utf-8")
        tensors = {"image": self.image.contiguous(), "scores": self.scores.contiguous()}
        save_tensors(folder / "tensors.safetensors", tensors, {"index": str(self.index)})
        self.args = (self._message(folder),)
        return folder


def check_scores(total: Any, images: Tensor, prompts: Sequence[str], reward: str = "") -> None:
    """Checks that ``total`` contains one finite score for each image.

    Args:
        total: the result of a reward, which should be a tensor of scores ``(b,)``.
        images: ``(b, 3, h, w)`` images that were scored.
        prompts: b prompts, one for each image.
        reward: name of the reward for messages; empty if unknown.

    Raises:
        NonFiniteReward: if a score is NaN or infinite.
        ValueError: if ``total`` is not a floating-point tensor, or has a wrong shape.
    """
    subject = f"the reward '{reward}' must return" if reward else "a reward must return"
    if not isinstance(total, Tensor):
        raise ValueError(
            f"{subject} a tensor of scores of shape ({len(images)},), not {type(total).__name__}; combine single "
            "scores with torch.stack"
        )
    if total.shape != (len(images),):
        raise ValueError(
            f"{subject} one score for each of {len(images)} images, got shape {tuple(total.shape)}; return shape "
            f"({len(images)},)"
        )
    if not total.is_floating_point():
        raise ValueError(f"{subject} floating-point scores, got {total.dtype}; convert them with scores.float()")
    finite = torch.isfinite(total.detach())
    if not finite.all():
        index = int((~finite).nonzero()[0])
        # clones, because the memory of the batch may be reused
        image, scores = (t.detach().cpu().clone() for t in (images[index], total))
        raise NonFiniteReward(index, prompts[index], image, scores, reward)
