"""Loads denoiser, VAE and scheduler config from folders in diffusers layout, the Hub, or single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from longalign import hub
from longalign.backbones.config import DiffusersConfig
from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.backbones.stable_diffusion.layout import layout_of
from longalign.files.paths import join_subfolder
from longalign.files.weights import load_tensors, reading
from longalign.runtime import Runtime, resolve_checkpoint


def load_parts(
    config: DiffusersConfig, runtime: Runtime, kind: Any, vae_kind: Any = AutoencoderKL
) -> tuple[Any, Any, dict[str, Any]]:
    """Loads denoiser, autoencoder and scheduler config from a folder in diffusers layout, the Hub or a single file.

    Args:
        config: config with the checkpoint and the denoiser's dtype.
        runtime: runtime with the autoencoder's dtype.
        kind: diffusers class of the denoiser.
        vae_kind: diffusers class of the autoencoder.

    Returns:
        The denoiser, the autoencoder and the scheduler config.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or does not contain all three.
        FileNotFoundError: if a single file does not exist.
    """
    if isinstance(config, StableDiffusionConfig) and config.single_file:
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
        vae = load(vae_kind, "vae", runtime.torch_dtype)
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


def _load_single_file(config: StableDiffusionConfig, runtime: Runtime, kind: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Returns what `load_parts` returns, from a single file with all weights under the names of the original code."""
    path = Path(config.checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} not found; expected the path of a local .safetensors file")
    state = load_tensors(path)
    layout = resolve_checkpoint(config.layout) if config.layout is not None else layout_of(path, state)
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
