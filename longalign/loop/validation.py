"""Samples validation images with fixed seeds during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.compose import Composition
from longalign.config.sections import ValidationConfig
from longalign.encoders.base import Encoder
from longalign.functional.rollout import RandomState
from longalign.loop.optimization import Optimization
from longalign.loop.trackers import Trackers


def sample_validation(
    backbone: Backbone,
    encoder: Encoder,
    settings: ValidationConfig,
    prompts: Sequence[str],
    folder: Path | None,
    step: int,
) -> Tensor:
    """Samples the validation prompts and writes ``folder/00.png``, ``01.png``...; image i has seed i.

    The random state of the training is not changed.

    Args:
        backbone: the model.
        encoder: encodes the prompts.
        settings: number of steps, guidance and solver.
        prompts: one prompt per image.
        folder: output folder of the images; None writes no images.
        step: training step, for the metadata of the images.

    Returns:
        Images ``(b, 3, h, w)`` in [0, 1].
    """
    from longalign.image_io import write_png
    from longalign.inference.sampling import sample

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


class Validation:
    """Samples the validation prompts during a run, into ``validation/<step>/``; does nothing if none are configured.

    Args:
        composition: the run, with its parts already built.
        optimization: the trained weights; their moving average is used if the run has one.
        prompts: one prompt per image.
        trackers: trackers that also receive the images.
    """

    def __init__(
        self, composition: Composition, optimization: Optimization, prompts: Sequence[str], trackers: Trackers
    ):
        self.composition, self.optimization = composition, optimization
        self.settings, self.prompts, self.trackers = composition.config.validation, prompts, trackers

    def is_due(self, step: int) -> bool:
        """Returns whether images are sampled after ``step`` completed steps."""
        return self.settings is not None and step % self.settings.every == 0

    def run(self, step: int) -> None:
        """Samples the images. All processes must call it. The first one samples; with sharded weights, all do."""
        if self.settings is None:
            return
        accelerator, composition = self.optimization.accelerator, self.composition
        is_main = accelerator.is_main_process
        if is_main or self.optimization.sharded:
            folder = Path(composition.config.output) / "validation" / f"{step:06d}" if is_main else None
            with self.optimization.averaged():
                images = sample_validation(
                    composition.backbone, composition.encoder, self.settings, self.prompts, folder, step
                )
            self.trackers.log_images(images, step)
        accelerator.wait_for_everyone()


def read_validation_prompts(settings: ValidationConfig | None) -> list[str]:
    """Returns the validation prompts from the config, or from a file in the format of the data ``prompts``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file contains no prompts.
    """
    if settings is None:
        return []
    prompts = settings.prompts
    if not isinstance(prompts, str):
        return list(prompts)
    from longalign.data.lines import read_prompts

    file_prompts = read_prompts(Path(prompts))
    if not file_prompts:
        raise ValueError(f"validation.prompts: {prompts} contains no prompts; expected at least one")
    return file_prompts
