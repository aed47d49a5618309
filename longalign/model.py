"""A model for sampling with the interface of diffusers pipelines: `Model.from_pretrained`, a call, and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from longalign.checkpoints import publish, upload
from longalign.checkpoints.checkpoint import load_for_sampling
from longalign.checkpoints.diffusers_files import denoiser_folder
from longalign.config.checks import check_files
from longalign.config.run import RunConfig, load_config
from longalign.files.paths import find_checkpoint
from longalign.image_io import to_pil
from longalign.inference.pipelines import base_pipeline
from longalign.inference.sampling import load_model, sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from longalign.backbones.base import Backbone
    from longalign.encoders.base import Encoder


class Images(list["Image"]):
    """A list of PIL images. Its attribute ``images`` is the list itself, for code that uses diffusers pipelines."""

    @property
    def images(self) -> Images:
        return self


def _resolve_alias(**aliases: Any) -> Any:
    """Returns the keyword argument that is not None; None if all are. Raises ValueError if several are not None."""
    values = {name: value for name, value in aliases.items() if value is not None}
    if len(values) > 1:
        raise ValueError(f"{' and '.join(aliases)} are names of the same setting, got both; pass one of them")
    return next(iter(values.values()), None)


class Model:
    """A text-to-image model for sampling: a diffusion backbone and a prompt encoder. All weights are frozen.

    Use `from_pretrained` for a trained model, and `from_config` for the untrained model of a config.

    Args:
        config: config of the run that trained the model, or the config from which the untrained model was built.
        backbone: denoiser and autoencoder, in eval mode.
        encoder: prompt encoder, in eval mode.
        checkpoint: path of the checkpoint's ``.safetensors`` file; None for a model built from a config.
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
        """Loads a checkpoint of longalign, with the base model and text encoders that its config names.

        All LoRAs are merged into the denoiser's weights.

        Args:
            checkpoint: a checkpoint file or folder, a run's folder (the newest checkpoint), or ``owner/name`` on the
                Hub.
            revision: branch, tag or commit on the Hub; the main branch if None. Ignored for a local checkpoint.
            device: a torch device, e.g. ``"cuda:1"``; the fastest available one if None.
            dtype: "float32", "bfloat16" or "float16"; if None, the dtypes of the training run.

        Raises:
            FileNotFoundError: if the checkpoint does not exist.
            ValueError: if the checkpoint was not written by longalign or has no backbone, or the device is not
                available.
        """
        path = find_checkpoint(str(checkpoint), revision)
        return cls(*load_for_sampling(path, device=device, dtype=dtype), path)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path | RunConfig, *, device: str | None = None, dtype: str | None = None
    ) -> Model:
        """Builds the untrained model of a config, from its backbone and encoder.

        If the config has ``init_from``, the model has the weights of that checkpoint.

        Args:
            config: a mapping, a YAML or JSON file, or a `RunConfig`.
            device: a torch device, e.g. ``"cuda:1"``; the fastest available one if None.
            dtype: "float32", "bfloat16" or "float16", for all weights except those of an adapter. If None,
                ``loop.precision`` sets the dtype, and ``backbone.dtype`` that of the denoiser.

        Raises:
            ConfigError: if the config is invalid or lacks a backbone or an encoder, or if its files do not exist or do
                not fit together; lists all problems.
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

        The argument names of diffusers are accepted as aliases. ``seeds`` replaces ``generator``.

        Args:
            prompt: one or several prompts.
            seeds: one seed for all prompts, one per prompt, or any number for a single prompt.
            negative: negative prompt, one for all images or one per image; the empty prompt if None.
            num_steps: number of sampling steps; 25 if None.
            guidance: scale of classifier-free guidance; 7.5 if None. 1 disables guidance.
            guidance_interval: ``(low, high)``: guidance applies only at steps whose ratio of noise to signal is above
                ``low`` and at most ``high``; at all steps if None. See `longalign.functional.guided_steps`.
            solver: "unipc", "ddim", "dpm++", or "lcm" for a consistency-distilled model.
            height: image height in pixels; the backbone's native resolution if None.
            width: image width in pixels; the backbone's native resolution if None.
            batch_size: number of images sampled at a time.
            progress: whether to show a progress bar.
            negative_prompt: alias of ``negative``.
            num_inference_steps: alias of ``num_steps``.
            guidance_scale: alias of ``guidance``.

        Returns:
            A list of PIL images. Its attribute ``images`` is the list itself.

        Raises:
            ValueError: if the numbers of prompts and seeds do not match, a setting is passed under both names, or a
                setting is out of range.
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
        """Returns the diffusers pipeline of the base model, with this model's denoiser (the same object, no copy).

        The text encoders are those of the base model. To use this model's ``encoder``, call the pipeline with the
        keyword arguments that `longalign.condition` returns for it, instead of a prompt.

        Args:
            **components: passed to ``DiffusionPipeline.from_pretrained``, e.g. ``text_encoder=None`` to load no text
                encoder.

        Raises:
            ValueError: if the base model is a single file or was built in code, and therefore has no pipeline.
        """
        denoiser = self.backbone.denoiser
        components = {denoiser_folder(self.config): denoiser, **components}
        return base_pipeline(self.config.backbone, denoiser.dtype, components).to(self.backbone.device)

    def save_pretrained(
        self, folder: str | Path, *, metrics: str | Path | None = None, license: str | None = None
    ) -> list[Path]:
        """Exports the model's checkpoint for `from_pretrained` and diffusers, with a model card.

        Args:
            folder: output folder; it must not contain an export.
            metrics: file written by ``longalign eval --json``, whose table the model card shows; None for no table.
            license: license identifier of the Hub for the model card, e.g. ``"openrail++"``; omitted if None.

        Returns:
            The files and folders written; see `longalign.checkpoints.publish.export`.

        Raises:
            ValueError: if the model was built from a config, ``folder`` contains an export, or ``metrics`` was not
                written by ``longalign eval --json`` or does not contain this model.
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
        """Exports the model's checkpoint as `save_pretrained` does, and uploads the export to the Hub.

        Args:
            repository: Hub repository ``owner/name``; created if it does not exist.
            private: whether a new repository is private; an existing one is not changed.
            token: access token of the Hub; None uses the token saved by ``hf auth login``.
            revision: branch to upload to, created if needed; the main branch if None.
            message: commit message.
            metrics: as for `save_pretrained`.
            license: as for `save_pretrained`.

        Returns:
            URL of the repository.

        Raises:
            ValueError: if the model was built from a config, ``metrics`` is invalid, or the Hub rejects the upload.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics, license=license)
            return upload.push_to_hub(folder, repository, private, token=token, revision=revision, message=message)
