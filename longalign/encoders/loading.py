"""Loads frozen text models and tokenizers from the Hub or a local folder, in diffusers or transformers layout."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from longalign.encoders.config import CheckpointConfig
from longalign.files.paths import join_subfolder
from longalign.files.weights import load_pretrained
from longalign.hub import find_checkpoint_file
from longalign.runtime import Runtime, resolve_checkpoint

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


def subfolders(checkpoint: str, subfolder: str | None, revision: str | None) -> tuple[str, str]:
    """Returns the subfolders of the text model and of the tokenizer in a checkpoint; ``""`` is the top level.

    A diffusers checkpoint has ``text_encoder`` and ``tokenizer``, and possibly ``text_encoder_2`` and ``tokenizer_2``.
    A transformers checkpoint has the files of text model and tokenizer at the top level. The tokenizer's subfolder is
    that of the text model with ``tokenizer`` in place of ``text_encoder``.

    Args:
        checkpoint: Hub id or local folder.
        subfolder: subfolder of the text model; None selects ``text_encoder`` if it exists, otherwise the top level.
        revision: branch, tag or commit on the Hub; None for the default branch.
    """
    if subfolder is None:
        is_diffusers = find_checkpoint_file(checkpoint, "text_encoder/config.json", revision) is not None
        subfolder = "text_encoder" if is_diffusers else ""
    return subfolder, subfolder.replace("text_encoder", "tokenizer")


def load_frozen_model(
    model_class: type,
    checkpoint: str | None,
    subfolder: str,
    revision: str | None,
    runtime: Runtime,
    variant: str | None = None,
    **weights: Any,
) -> Any:
    """Loads and returns a frozen transformers model in eval mode, on the device and in the dtype of ``runtime``.

    Args:
        model_class: transformers class of the model.
        checkpoint: Hub id or folder; None if ``weights`` contains ``config`` and ``state_dict``.
        subfolder: subfolder of the checkpoint; ``""`` for the top level.
        revision: branch, tag or commit on the Hub; None for the default branch.
        runtime: device and dtype.
        variant: file variant, e.g. ``"fp16"``; None for the files without a variant.
        **weights: further arguments of ``model_class.from_pretrained``.

    Raises:
        ValueError: if the checkpoint does not exist or weights are missing.
    """
    # silence transformers' report of unused weights, e.g. an image tower; missing weights are checked below
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = load_pretrained(
            model_class,
            checkpoint,
            subfolder=subfolder,
            hint=" (or text_encoder/ and tokenizer/); set 'variant' for files such as model.fp16.safetensors",
            revision=revision,
            variant=variant,
            dtype=runtime.torch_dtype,
            **_key_mapping(model_class),
            **weights,
        )
    finally:
        logging.set_verbosity(verbosity)
    return model.requires_grad_(False).eval().to(runtime.device)


def _key_mapping(model_class: type) -> dict[str, Any]:
    """Returns options of ``from_pretrained`` that map CLIP's weight names to those of transformers 4.

    Empty for other models and with transformers 5, in which CLIP's text model has one module level less.
    """
    from transformers.models.clip import modeling_clip

    nested = model_class is modeling_clip.CLIPTextModel and hasattr(modeling_clip, "CLIPTextTransformer")
    return {"key_mapping": {r"^(?=embeddings\.|encoder\.|final_layer_norm\.)": "text_model."}} if nested else {}


def load_tokenizer(checkpoint: str, subfolder: str, revision: str | None) -> Any:
    """Loads and returns the tokenizer of a checkpoint, a fast one if possible. Code of the checkpoint is not run.

    Args:
        checkpoint: Hub id or local folder.
        subfolder: subfolder of the tokenizer; ``""`` for the top level.
        revision: branch, tag or commit on the Hub; None for the default branch.

    Raises:
        ValueError: if the checkpoint has no tokenizer, or the tokenizer's files cannot be read.
    """
    location = f"'{checkpoint}'" + (f", subfolder '{subfolder}'" if subfolder else "")
    # without a vocabulary file transformers silently creates a tokenizer with an empty vocabulary
    if not any(find_checkpoint_file(checkpoint, join_subfolder(subfolder, name), revision) for name in _VOCABULARIES):
        raise ValueError(
            f"no tokenizer in {location}; expected one of {', '.join(_VOCABULARIES)}. Add the tokenizer's files, or "
            "use a different checkpoint"
        )
    # without trust_remote_code=False transformers prompts whether to run code of the checkpoint
    options: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "trust_remote_code": False}
    try:
        try:
            return AutoTokenizer.from_pretrained(checkpoint, **options)
        except AttributeError:  # transformers 4 expects a mapping, transformers 5 saves a list
            return AutoTokenizer.from_pretrained(checkpoint, **options, extra_special_tokens={})
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer in {location}; check its files: {error}") from error


def load_text_model(
    model_class: type, config: CheckpointConfig, subfolder: str | None, runtime: Runtime
) -> tuple[Any, Any]:
    """Loads the text model and tokenizer of an encoder's checkpoint; returns ``(model, tokenizer)``.

    The model is frozen and in eval mode.

    Args:
        model_class: transformers class of the text model.
        config: the encoder's config; gives checkpoint, revision and variant.
        subfolder: subfolder of the text model; None selects ``text_encoder`` if it exists, otherwise the top level.
        runtime: device and dtype of the model.

    Raises:
        ValueError: if the checkpoint does not exist, or weights or the tokenizer are missing.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    model_folder, tokenizer_folder = subfolders(checkpoint, subfolder, config.revision)
    model = load_frozen_model(model_class, checkpoint, model_folder, config.revision, runtime, config.variant)
    return model, load_tokenizer(checkpoint, tokenizer_folder, config.revision)
