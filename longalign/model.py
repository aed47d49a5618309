"""A trained model as users of diffusers know one: `from_pretrained`, a call, `save_pretrained`, `push_to_hub`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from longalign import publish
from longalign.baselines import base_pipeline
from longalign.checkpoint import denoiser_folder, load_for_sampling
from longalign.config import RunConfig
from longalign.files import find_checkpoint
from longalign.image_io import to_pil
from longalign.pipeline import sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from longalign.backbones.base import Backbone
    from longalign.encoders.base import Encoder


class Images(list["Image"]):
    """A list of PIL images, which code written for diffusers reads as ``.images``."""

    @property
    def images(self) -> Images:
        return self


def _either(**given: Any) -> Any:
    """The one of two names' values that is not None, or None. Raises ValueError if both are given."""
    values = {name: value for name, value in given.items() if value is not None}
    if len(values) > 1:
        raise ValueError(f"{' and '.join(given)} are the same setting; give one of them")
    return next(iter(values.values()), None)


class Model:
    """What a checkpoint draws with, frozen: its backbone with all LoRAs merged, and its encoder with its adapter.

    Args:
        config: of the run.
        backbone: denoiser and autoencoder.
        encoder: of prompts.
        checkpoint: the file that they are from.
    """

    def __init__(self, config: RunConfig, backbone: Backbone, encoder: Encoder, checkpoint: Path):
        self.config, self.backbone, self.encoder, self.checkpoint = config, backbone, encoder, checkpoint

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> Model:
        """Loads a checkpoint, and the base model and the text encoders that it names.

        Args:
            checkpoint: its file, its folder, a run's folder (the newest one), or ``owner/name`` on the hub.
            revision: branch, tag or commit on the hub.
            device: a torch device; the best of this machine if None.
            dtype: "float32", "bfloat16" or "float16"; that of the training if None.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was not written by longalign, or the device is not available.
        """
        path = find_checkpoint(str(checkpoint), revision)
        return cls(*load_for_sampling(path, device=device, dtype=dtype), path)

    def __repr__(self) -> str:
        parts = (("backbone", self.config.backbone), ("encoder", self.config.encoder))
        shown = [f"{key}={part and part.name!r}" for key, part in parts]
        denoiser = self.backbone.denoiser
        return f"Model({str(self.checkpoint)!r}, {', '.join(shown)}, {denoiser.dtype}, device='{self.backbone.device}')"

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        negative: str | Sequence[str] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        solver: str = "unipc",
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        progress: bool = False,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Images:
        """Generates one image for each prompt, or for each seed of one prompt.

        The arguments have this library's names. Those of diffusers do as well: ``negative_prompt`` is ``negative``,
        ``num_inference_steps`` is ``steps``, ``guidance_scale`` is ``guidance``. ``seeds`` replaces ``generator``.

        Args:
            prompt: one or several.
            seeds: one for all prompts, one for each, or any number for a single prompt.
            negative: one text for all, or one for each image; the empty prompt if None.
            steps: sampling steps; 25 if None.
            guidance: scale of classifier-free guidance; 7.5 if None, and 1 is none.
            scheduler: "unipc", "ddim", "dpm++" or "lcm".
            height: pixels; the backbone's own resolution if None.
            width: pixels; the backbone's own resolution if None.
            batch_size: images sampled at a time.
            progress: whether to show a bar.
            negative_prompt: the same as ``negative``.
            num_inference_steps: the same as ``steps``.
            guidance_scale: the same as ``guidance``.

        Returns:
            A list of PIL images, which is also its own ``images``.

        Raises:
            ValueError: if the numbers of prompts and seeds do not fit, or a setting is given by both of its names.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        numbers = [seeds] * len(texts) if isinstance(seeds, int) else list(seeds)
        if len(texts) == 1:
            texts *= len(numbers)
        if not texts or len(texts) != len(numbers):
            raise ValueError(
                "expected one seed, one for each prompt, or any number for a single prompt, "
                f"got {len(numbers)} seeds and {len(texts)} prompts"
            )
        settings = {
            "negative": _either(negative=negative, negative_prompt=negative_prompt),
            "num_steps": _either(num_steps=num_steps, num_inference_steps=num_inference_steps),
            "guidance": _either(guidance=guidance, guidance_scale=guidance_scale),
        }
        images = sample(
            self.backbone,
            self.encoder,
            texts,
            seeds=numbers,
            solver=solver,
            height=height,
            width=width,
            batch_size=batch_size,
            progress=progress,
            **{key: value for key, value in settings.items() if value is not None},
        )
        return Images(to_pil(image) for image in images)

    def to_pipeline(self, **components: Any) -> Any:
        """The base model's stock diffusers pipeline with this model's denoiser, sharing its weights.

        Its own text encoders know nothing of this model's: call it with what `longalign.condition` makes of prompts and
        this model's ``encoder``.

        Args:
            **components: handed to ``DiffusionPipeline.from_pretrained``, e.g. ``text_encoder=None`` to load none.

        Raises:
            ValueError: if the base model has no pipeline, because it is in a single file or made in code.
        """
        denoiser = self.backbone.denoiser
        components = {denoiser_folder(self.config): denoiser, **components}
        return base_pipeline(self.config.backbone, denoiser.dtype, components).to(self.backbone.device)

    def save_pretrained(
        self, folder: str | Path, *, metrics: str | Path | None = None, license: str | None = None
    ) -> list[Path]:
        """Writes what `from_pretrained`, plain diffusers and a reader need; see `longalign.publish.export`."""
        return publish.export(self.checkpoint, folder, metrics, license)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        message: str = "Upload a longalign checkpoint",
        metrics: str | Path | None = None,
        license: str | None = None,
    ) -> str:
        """Saves and uploads, see `longalign.publish.push_to_hub`; returns the address."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics, license=license)
            return publish.push_to_hub(folder, repository, private, token=token, revision=revision, message=message)
