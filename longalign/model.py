"""A model with the interface of diffusers: `from_pretrained`, a call, `save_pretrained`, `push_to_hub`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from longalign.checkpoints import publish, upload
from longalign.checkpoints.checkpoint import load_for_sampling
from longalign.checkpoints.diffusers_files import denoiser_folder
from longalign.config.checks import check_files
from longalign.config.files import find_checkpoint
from longalign.config.run import RunConfig, load_config
from longalign.image_io import to_pil
from longalign.inference.pipelines import base_pipeline
from longalign.inference.sampling import load_model, sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from longalign.backbones.base import Backbone
    from longalign.encoders.base import Encoder


class Images(list["Image"]):
    """A list of PIL images with diffusers' attribute ``images``."""

    @property
    def images(self) -> Images:
        return self


def _resolve_alias(**aliases: Any) -> Any:
    """Returns the alias that is set, or None. Raises ValueError if several aliases are set."""
    values = {name: value for name, value in aliases.items() if value is not None}
    if len(values) > 1:
        raise ValueError(f"{' and '.join(aliases)} are the same setting; pass one of them")
    return next(iter(values.values()), None)


class Model:
    """A model for inference: a backbone, and an encoder with its adapter. All weights are frozen.

    Use `from_pretrained` for a trained model, and `from_config` for the base model of a config.

    Args:
        config: config of the run.
        backbone: denoiser and autoencoder.
        encoder: prompt encoder.
        checkpoint: file of the checkpoint; None for a model built from a config.
    """

    def __init__(self, config: RunConfig, backbone: Backbone, encoder: Encoder, checkpoint: Path | None):
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
        """Loads a checkpoint with its base model and text encoders. All LoRAs are merged.

        Args:
            checkpoint: a checkpoint file or folder, a run folder (its newest checkpoint), or ``owner/name`` on
                the Hub.
            revision: branch, tag or commit on the Hub.
            device: a torch device; the fastest available one if None.
            dtype: "float32", "bfloat16" or "float16"; the training dtype if None.

        Raises:
            FileNotFoundError: if the checkpoint does not exist.
            ValueError: if it was not written by longalign, or the device is not available.
        """
        path = find_checkpoint(str(checkpoint), revision)
        return cls(*load_for_sampling(path, device=device, dtype=dtype), path)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path | RunConfig, *, device: str | None = None, dtype: str | None = None
    ) -> Model:
        """Builds the base model of a config, with the config's encoder and without training.

        With ``init_from``, the model has the weights of that checkpoint.

        Args:
            config: a mapping, a YAML or JSON file, or a `RunConfig`; only backbone, encoder and ``init_from`` are used.
            device: a torch device; the fastest available one if None.
            dtype: "float32", "bfloat16" or "float16"; the dtype of ``loop.precision`` if None.

        Raises:
            ConfigError: if the config or its files are invalid, or it has no backbone or no encoder; lists all
                problems.
            ValueError: if the device is not available.
        """
        config = load_config(config)
        check_files(config, training=False)
        _, backbone, encoder = load_model(config, dtype, device)
        return cls(config, backbone, encoder, None)

    def __repr__(self) -> str:
        parts = (("backbone", self.config.backbone), ("encoder", self.config.encoder))
        components = [f"{key}={part and part.name!r}" for key, part in parts]
        denoiser = self.backbone.denoiser
        name, device = "no checkpoint" if self.checkpoint is None else str(self.checkpoint), self.backbone.device
        return f"Model({name!r}, {', '.join(components)}, {denoiser.dtype}, device='{device}')"

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        negative: str | Sequence[str] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: str = "unipc",
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        progress: bool = False,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Images:
        """Generates one image per prompt, or one per seed of a single prompt.

        The names of diffusers work too: ``negative_prompt``, ``num_inference_steps`` and ``guidance_scale``. ``seeds``
        replaces ``generator``.

        Args:
            prompt: one or several prompts.
            seeds: one seed for all prompts, one per prompt, or any number for a single prompt.
            negative: negative prompt, one for all images or one per image; the empty prompt if None.
            num_steps: sampling steps; 25 if None.
            guidance: scale of classifier-free guidance; 7.5 if None. 1 disables it.
            guidance_interval: noise levels of the steps with guidance; see `longalign.functional.guided_steps`.
            solver: "unipc", "ddim", "dpm++" or "lcm".
            height: pixels; the backbone's own resolution if None.
            width: pixels; the backbone's own resolution if None.
            batch_size: images per batch.
            progress: whether to show a progress bar.
            negative_prompt: alias of ``negative``.
            num_inference_steps: alias of ``num_steps``.
            guidance_scale: alias of ``guidance``.

        Returns:
            A list of PIL images. Its attribute ``images`` is the list itself.

        Raises:
            ValueError: if the numbers of prompts and seeds do not match, or a setting is passed under both names.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        numbers = [seeds] * len(texts) if isinstance(seeds, int) else list(seeds)
        if len(texts) == 1:
            texts *= len(numbers)
        if not texts or len(texts) != len(numbers):
            raise ValueError(
                "expected one seed, one seed per prompt, or any number of seeds for a single prompt, "
                f"got {len(numbers)} seeds and {len(texts)} prompts"
            )
        settings = {
            "negative": _resolve_alias(negative=negative, negative_prompt=negative_prompt),
            "num_steps": _resolve_alias(num_steps=num_steps, num_inference_steps=num_inference_steps),
            "guidance": _resolve_alias(guidance=guidance, guidance_scale=guidance_scale),
        }
        images = sample(
            self.backbone,
            self.encoder,
            texts,
            seeds=numbers,
            guidance_interval=guidance_interval,
            solver=solver,
            height=height,
            width=width,
            batch_size=batch_size,
            progress=progress,
            **{key: value for key, value in settings.items() if value is not None},
        )
        return Images(to_pil(image) for image in images)

    def to_pipeline(self, **components: Any) -> Any:
        """Returns the base model's diffusers pipeline with this model's denoiser, sharing its weights.

        The pipeline's own text encoders are unchanged. Pass it the output of `longalign.condition` with this model's
        ``encoder``.

        Args:
            **components: passed to ``DiffusionPipeline.from_pretrained``, e.g. ``text_encoder=None`` to load none.

        Raises:
            ValueError: if the base model has no pipeline because it is a single file, or was built in code.
        """
        denoiser = self.backbone.denoiser
        components = {denoiser_folder(self.config): denoiser, **components}
        return base_pipeline(self.config.backbone, denoiser.dtype, components).to(self.backbone.device)

    def save_pretrained(
        self, folder: str | Path, *, metrics: str | Path | None = None, license: str | None = None
    ) -> list[Path]:
        """Exports a checkpoint for `from_pretrained` and diffusers, with a model card; returns the written files.

        Args:
            folder: output folder.
            metrics: output of ``longalign eval --json``, shown in the model card.
            license: the Hub's license id for the model card.

        Raises:
            ValueError: if the model was built from a config.
        """
        if self.checkpoint is None:
            raise ValueError(
                "a model built from a config has no checkpoint to save; load a trained one with Model.from_pretrained"
            )
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
        """Saves the model, uploads it to the Hub and returns its URL.

        Args:
            repository: Hub repository ``owner/name``; created if it does not exist.
            private: whether a new repository is private.
            token: access token of the Hub; None uses the stored login.
            revision: branch to upload to.
            message: commit message.
            metrics: output of ``longalign eval --json``, shown in the model card.
            license: the Hub's license id for the model card.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics, license=license)
            return upload.push_to_hub(folder, repository, private, token=token, revision=revision, message=message)
