"""A trained model as users of diffusers know one: `from_pretrained`, a call, `save_pretrained`, `push_to_hub`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from longalign import publish
from longalign.checkpoint import denoiser_folder, load_for_sampling
from longalign.config import RunConfig, load_config
from longalign.files import find_checkpoint
from longalign.imagefiles import to_pil
from longalign.pipeline import sample
from longalign.runtime import Runtime
from longalign.stock import base_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

    from longalign.backbones.base import Backbone
    from longalign.encoders.base import Encoder


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
            device: a torch device; CUDA if there is one, else the CPU, if None.
            dtype: "float32", "bfloat16" or "float16"; that of the training if None.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was not written by longalign.
        """
        path = find_checkpoint(str(checkpoint), revision)
        found = Runtime.detect(load_config(path).loop.precision)
        runtime = Runtime(device or found.device, dtype or found.dtype)
        return cls(*load_for_sampling(path, runtime), path)

    def __call__(self, prompts: str | Sequence[str], *, seeds: int | Sequence[int] = 0, **settings: Any) -> list[Image]:
        """Draws one image for each prompt.

        Args:
            prompts: one or several.
            seeds: one for all, or one for each.
            **settings: ``negative, steps, guidance, scheduler, height, width, batch_size, progress`` of
                `longalign.pipeline.sample`.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        numbers = [seeds] * len(texts) if isinstance(seeds, int) else list(seeds)
        return [to_pil(image) for image in sample(self.backbone, self.encoder, texts, seeds=numbers, **settings)]

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
