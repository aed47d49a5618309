"""Images drawn while training, always from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.config import ValidationConfig
from longalign.encoders.base import Encoder
from longalign.rollout import RandomState


def draw(
    backbone: Backbone,
    encoder: Encoder,
    settings: ValidationConfig,
    prompts: Sequence[str],
    folder: Path | None,
    step: int,
) -> Tensor:
    """Samples the validation prompts into ``folder/00.png``, ``01.png``...; the i-th with seed i. Without a folder
    nothing is written.

    The training's random numbers are left alone.

    Returns:
        Images ``(b, 3, h, w)`` in [0, 1].
    """
    from longalign.image_io import write_png
    from longalign.pipeline import sample

    with RandomState.now(backbone.device).replayed():
        images = sample(
            backbone,
            encoder,
            prompts,
            seeds=range(len(prompts)),
            num_steps=settings.num_steps,
            guidance=settings.guidance,
            solver=settings.solver,
        )
    if folder is None:
        return images
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        write_png(folder / f"{i:02d}.png", image, {"prompt": prompt, "step": str(step), "seed": str(i)})
    return images


def read(settings: ValidationConfig | None) -> list[str]:
    """The validation prompts themselves, or those of a file, as the data kind ``prompts`` reads it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds none.
    """
    if settings is None:
        return []
    prompts = settings.prompts
    if not isinstance(prompts, str):
        return list(prompts)
    from longalign.data.lines import read_prompts

    found = read_prompts(Path(prompts))
    if not found:
        raise ValueError(f"validation.prompts: {prompts} holds no prompts")
    return found
