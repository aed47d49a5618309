"""What is checked of a reward's scores. Where one is not finite, the image and prompt that caused it are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longalign.errors import RunError

if TYPE_CHECKING:
    from longalign.rewards.base import Reward, Scores


class NonFiniteReward(RunError):
    """A reward is NaN or infinite; training with it would spoil the model at the next step.

    Attributes:
        reward: what the reward is called.
        index: place of the first such image in the batch.
        prompt: its prompt.
        image: the image ``(3, h, w)``, on the CPU and without gradient.
        scores: ``(b,)`` all scores of the batch.
    """

    def __init__(self, index: int, prompt: str, image: Tensor, scores: Tensor, reward: str = ""):
        self.index, self.prompt, self.image, self.scores, self.reward = index, prompt, image, scores, reward
        super().__init__(self._message())

    def _message(self, folder: Path | None = None) -> str:
        bad = int((~torch.isfinite(self.scores)).sum())
        state = "finite" if bool(torch.isfinite(self.image).all()) else "not finite either"
        prompt = self.prompt if len(self.prompt) <= 80 else self.prompt[:77] + "..."
        whose = f" of the reward '{self.reward}'" if self.reward else ""
        return (
            f"{bad} of {len(self.scores)} scores{whose} are not finite; the first is {self.scores[self.index].item()} "
            f"at index {self.index}, prompt {prompt!r}; the image's pixels are {state}"
            + (f"; image, prompt and tensors are kept in {folder}" if folder else "")
        )

    def save(self, folder: str | Path) -> Path:
        """Writes ``image.png``, ``prompt.txt`` and ``tensors.safetensors`` (``image``, ``scores``) into a folder.

        The folder is made if it is missing, and named in the message of this error from then on. In the PNG, pixels
        that are not finite are black; the tensor has them as they were.
        """
        from PIL import Image

        from longalign.weights import save_tensors

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = self.image.float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255).round().byte()
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(folder / "image.png")
        (folder / "prompt.txt").write_text(self.prompt, encoding="utf-8")
        tensors = {"image": self.image.contiguous(), "scores": self.scores.contiguous()}
        save_tensors(folder / "tensors.safetensors", tensors, {"index": str(self.index)})
        self.args = (self._message(folder),)
        return folder


def check_scores(total: Any, images: Tensor, prompts: Sequence[str], reward: str = "") -> None:
    """Raises unless ``total`` holds one finite score for each image.

    Args:
        total: ``(b,)`` scores.
        images: ``(b, 3, h, w)``.
        prompts: one for each image.
        reward: what the reward is called in messages.

    Raises:
        NonFiniteReward: if a score is NaN or infinite.
        ValueError: if it is no tensor of floating-point numbers, or its shape is another.
    """
    who = f"the reward '{reward}' must return" if reward else "a reward must return"
    if not isinstance(total, Tensor):
        raise ValueError(f"{who} a tensor of scores, not {type(total).__name__}")
    if total.shape != (len(images),):
        raise ValueError(f"{who} one score for each of {len(images)} images, got shape {tuple(total.shape)}")
    if not total.is_floating_point():
        raise ValueError(f"{who} floating-point numbers, got {total.dtype}")
    finite = torch.isfinite(total.detach())
    if not finite.all():
        index = int((~finite).nonzero()[0])
        # clones: what was seen must not change when the batch's memory is used again
        image, scores = (t.detach().cpu().clone() for t in (images[index], total))
        raise NonFiniteReward(index, prompts[index], image, scores, reward)


def guarded(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Scores:
    """The scores of a reward that may be a plugin's, checked.

    Args:
        reward: what scores.
        images: ``(b, 3, h, w)`` in [0, 1]; where they carry gradient, so must the scores.
        prompts: one for each image.

    Raises:
        NonFiniteReward: if a score is NaN or infinite.
        ValueError: if the scores are not one floating-point number for each image, have no gradient in images that
            carry some, or the reward has written into the images.
    """
    who = reward.label or type(reward).__name__
    before = None if images.is_inference() else images._version
    scores = reward.scores(images, prompts)
    if before is not None and images._version != before:
        raise ValueError(f"the reward '{who}' writes into its images; let it work on a copy (images.clone())")
    check_scores(getattr(scores, "total", scores), images, prompts, who)
    if images.requires_grad and torch.is_grad_enabled() and not scores.total.requires_grad:
        raise ValueError(
            f"the reward '{who}' has no gradient in its images, so nothing can be trained by it; let it compute "
            "with the tensors that it gets, without detach, numpy or torch.no_grad"
        )
    return scores
