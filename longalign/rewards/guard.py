"""What happens when a reward is not a finite number: the image and prompt that caused it are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class NonFiniteReward(RuntimeError):
    """A reward is NaN or infinite; going on would spoil the model at the next step.

    Attributes:
        index: place of the first such image in the batch.
        prompt: its prompt.
        image: the image ``(3, h, w)``, on the CPU and without gradient.
        scores: ``(b,)`` all scores of the batch.
    """

    def __init__(self, index: int, prompt: str, image: Tensor, scores: Tensor):
        self.index, self.prompt, self.image, self.scores = index, prompt, image, scores
        super().__init__(self._message())

    def _message(self, folder: Path | None = None) -> str:
        bad = int((~torch.isfinite(self.scores)).sum())
        state = "finite" if bool(torch.isfinite(self.image).all()) else "not finite either"
        prompt = self.prompt if len(self.prompt) <= 80 else self.prompt[:77] + "..."
        return (
            f"{bad} of {len(self.scores)} rewards are not finite; the first is {self.scores[self.index].item()} at "
            f"index {self.index}, prompt {prompt!r}; the image's pixels are {state}"
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


def check_scores(total: Tensor, images: Tensor, prompts: Sequence[str]) -> None:
    """Raises unless ``total`` holds one finite score for each image.

    Args:
        total: ``(b,)`` scores.
        images: ``(b, 3, h, w)``.
        prompts: one for each image.

    Raises:
        NonFiniteReward: if a score is NaN or infinite.
        ValueError: if the shape is another.
    """
    if total.shape != (len(images),):
        raise ValueError(f"expected one score for each of {len(images)} images, got shape {tuple(total.shape)}")
    finite = torch.isfinite(total.detach())
    if not finite.all():
        index = int((~finite).nonzero()[0])
        # clones: what was seen must not change when the batch's memory is used again
        image, scores = (t.detach().cpu().clone() for t in (images[index], total))
        raise NonFiniteReward(index, prompts[index], image, scores)
