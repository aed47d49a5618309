"""Loading frozen text models and tokenizers from a hub id or a local folder, in diffusers or transformers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer

from longalign.runtime import Runtime, resolve_checkpoint


def find_file(checkpoint: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a local folder or of a hub repository (downloaded if need be); None if there is no such file."""
    if Path(checkpoint).exists():
        path = Path(checkpoint) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(checkpoint, file, revision=revision))
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise ValueError(f"no local folder '{checkpoint}', and the hub answered: {error}") from error


def subfolders(checkpoint: str, subfolder: str | None, revision: str | None) -> tuple[str, str]:
    """Subfolders of text model and tokenizer.

    A diffusers checkpoint has ``text_encoder`` and ``tokenizer`` (and ``text_encoder_2``, ``tokenizer_2``); a
    transformers one has both at its top. A given ``subfolder`` is the text model's.
    """
    if subfolder is None:
        diffusers = find_file(checkpoint, "text_encoder/config.json", revision) is not None
        subfolder = "text_encoder" if diffusers else ""
    return subfolder, subfolder.replace("text_encoder", "tokenizer")


def load_model(kind: type, checkpoint: str, subfolder: str, revision: str | None, runtime: Runtime) -> Any:
    """A frozen transformers model in evaluation mode, on the runtime's device and in its dtype.

    Raises:
        ValueError: if there is no such checkpoint, or weights of the model are missing in it.
    """
    try:
        model, info = kind.from_pretrained(  # type: ignore[attr-defined]
            checkpoint, subfolder=subfolder, revision=revision, dtype=runtime.torch_dtype, output_loading_info=True
        )
    except OSError as error:
        place = f"'{checkpoint}'" + (f", subfolder '{subfolder}'" if subfolder else "")
        raise ValueError(
            f"no {kind.__name__} in {place}; expected a hub id or a folder with config.json and weights "
            f"(or text_encoder/ and tokenizer/): {error}"
        ) from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ValueError(
            f"'{checkpoint}' is not a {kind.__name__}: {len(lacking)} weights are missing, e.g. '{lacking[0]}'"
        )
    return model.requires_grad_(False).eval().to(runtime.device)


def load_tokenizer(checkpoint: str, subfolder: str, revision: str | None) -> Any:
    """The checkpoint's fast tokenizer. Raises ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint, subfolder=subfolder, revision=revision)
    except (OSError, ValueError) as error:
        place = f"'{checkpoint}'" + (f", subfolder '{subfolder}'" if subfolder else "")
        raise ValueError(f"no tokenizer in {place}; expected tokenizer_config.json and vocabulary: {error}") from error


def load_text_model(
    kind: type, checkpoint: str, subfolder: str | None, revision: str | None, runtime: Runtime
) -> tuple[Any, Any]:
    """Text model and tokenizer of a checkpoint: a hub id, a folder, or ``mini/...`` for the bundled weights."""
    checkpoint = resolve_checkpoint(checkpoint)
    model_folder, tokenizer_folder = subfolders(checkpoint, subfolder, revision)
    model = load_model(kind, checkpoint, model_folder, revision, runtime)
    return model, load_tokenizer(checkpoint, tokenizer_folder, revision)
