"""Loading frozen text models and tokenizers from a hub id or a local folder, in diffusers or transformers layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer
from transformers.utils import logging

from longalign.hub import why
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.weights import reading

if TYPE_CHECKING:
    from longalign.encoders.configs import CheckpointConfig

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


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
        raise ValueError(f"no local folder '{checkpoint}', and on the hub: {why(error, file)}") from error


def subfolders(checkpoint: str, subfolder: str | None, revision: str | None) -> tuple[str, str]:
    """Subfolders of text model and tokenizer.

    A diffusers checkpoint has ``text_encoder`` and ``tokenizer`` (and ``text_encoder_2``, ``tokenizer_2``); a
    transformers one has both at its top. A given ``subfolder`` is the text model's.
    """
    if subfolder is None:
        diffusers = find_file(checkpoint, "text_encoder/config.json", revision) is not None
        subfolder = "text_encoder" if diffusers else ""
    return subfolder, subfolder.replace("text_encoder", "tokenizer")


def load_model(
    kind: type,
    checkpoint: str | None,
    subfolder: str,
    revision: str | None,
    runtime: Runtime,
    variant: str | None = None,
    **given: Any,
) -> Any:
    """A frozen transformers model in evaluation mode, on the runtime's device and in its dtype.

    Args:
        kind: its class.
        checkpoint: hub id or folder; None for ``given`` weights.
        subfolder: where in it.
        revision: branch, tag or commit on the hub.
        runtime: device and dtype.
        variant: file variant, e.g. ``"fp16"``.
        **given: without a checkpoint, the ``config`` and ``state_dict``.

    Raises:
        ValueError: if there is no such checkpoint, or weights of the model are missing in it.
    """
    # transformers lists every weight that is left out, such as a whole image tower; what is missing is checked here
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    place = f"'{checkpoint}'" + (f", subfolder '{subfolder}'" if subfolder else "")
    try:
        with reading(f"a file of weights in {place}"):
            model, info = kind.from_pretrained(  # type: ignore[attr-defined]
                checkpoint,
                subfolder=subfolder,
                revision=revision,
                variant=variant,
                dtype=runtime.torch_dtype,
                output_loading_info=True,
                **_renaming(kind),
                **given,
            )
    except OSError as error:
        raise ValueError(
            f"no {kind.__name__} in {place}; expected a hub id or a folder with config.json and weights "
            "(or text_encoder/ and tokenizer/); see 'variant' for weights in files such as model.fp16.safetensors: "
            f"{error if Path(str(checkpoint)).exists() else why(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted(info["missing_keys"])
    if lacking:
        what = f"'{checkpoint}' is not a {kind.__name__}" if checkpoint else f"expected a whole {kind.__name__}"
        raise ValueError(f"{what}: {len(lacking)} weights are missing, e.g. '{lacking[0]}'")
    return model.requires_grad_(False).eval().to(runtime.device)


def _renaming(kind: type) -> dict[str, Any]:
    """For transformers 4, whose CLIP text model has its weights one module deeper than 5 has, and saves, them."""
    from transformers.models.clip import modeling_clip

    nested = kind is modeling_clip.CLIPTextModel and hasattr(modeling_clip, "CLIPTextTransformer")
    return {"key_mapping": {r"^(?=embeddings\.|encoder\.|final_layer_norm\.)": "text_model."}} if nested else {}


def load_tokenizer(checkpoint: str, subfolder: str, revision: str | None) -> Any:
    """The checkpoint's fast tokenizer. Raises ValueError if there is none."""
    place = f"'{checkpoint}'" + (f", subfolder '{subfolder}'" if subfolder else "")
    inside = f"{subfolder}/" if subfolder else ""
    # without these transformers makes a tokenizer with no vocabulary and says nothing
    if not any(find_file(checkpoint, inside + name, revision) for name in _VOCABULARIES):
        raise ValueError(f"no tokenizer in {place}; expected one of {', '.join(_VOCABULARIES)}")
    # without the last one transformers asks whether code in the checkpoint shall run
    where: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "trust_remote_code": False}
    try:
        try:
            return AutoTokenizer.from_pretrained(checkpoint, **where)
        except AttributeError:  # transformers 4 wants a mapping where 5 has written a list
            return AutoTokenizer.from_pretrained(checkpoint, **where, extra_special_tokens={})
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer in {place} cannot be read: {error}") from error


def load_text_model(kind: type, config: CheckpointConfig, subfolder: str | None, runtime: Runtime) -> tuple[Any, Any]:
    """Text model and tokenizer of the checkpoint that an encoder's config names.

    Args:
        kind: transformers' class of the text model.
        config: of the encoder.
        subfolder: where in the checkpoint the text model is; None finds it.
        runtime: device and dtype.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    model_folder, tokenizer_folder = subfolders(checkpoint, subfolder, config.revision)
    model = load_model(kind, checkpoint, model_folder, config.revision, runtime, config.variant)
    return model, load_tokenizer(checkpoint, tokenizer_folder, config.revision)
