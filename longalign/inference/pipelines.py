"""Loads diffusers pipelines."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import deprecation_utils
from huggingface_hub import constants

from longalign.hub import availability_problem, download_problem, local_file
from longalign.runtime import Runtime, resolve_checkpoint

log = logging.getLogger("longalign")

library: Any = diffusers  # lazy module: its classes are invisible to type checkers
# newer diffusers calls it "dtype" and warns about "torch_dtype"
DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def load_pipeline(name: str, runtime: Runtime, revision: str | None = None, variant: str | None = None) -> Any:
    """Loads a text-to-image pipeline of diffusers, without its progress bar.

    Kandinsky's decoder is combined with the prior that the decoder's README.md names.

    Args:
        name: Hub id, or a folder with ``model_index.json``.
        runtime: device and dtype of the pipeline.
        revision: branch, tag or commit of the Hub repository, and of the repository of a prior; None: the main branch.
        variant: variant of the weight files, e.g. ``"fp16"``; None: files without a variant. Components that have no
            files of the variant are loaded from files without one.

    Raises:
        ValueError: if the pipeline or variant does not exist, the pipeline takes no prompt, or ``revision`` is given
            for a local folder.
    """
    if revision is not None and Path(name).is_dir():
        raise ValueError(f"revision only applies to a Hub repository, but '{name}' is a local folder; omit revision")
    name = resolve_checkpoint(name)
    _announce_download(name, revision, runtime)
    settings: dict[str, Any] = {DTYPE: runtime.torch_dtype, "revision": revision, "variant": variant}
    reason = ""
    try:
        try:
            pipe = library.AutoPipelineForText2Image.from_pretrained(name, **settings)
        except ValueError as error:  # a class unknown to AutoPipeline, or a decoder without its prior
            reason = str(error)
            pipe = library.DiffusionPipeline.from_pretrained(name, **settings)
    except (ImportError, OSError, ValueError) as error:
        # transformers 4 names its dummy objects for missing libraries "placeholder"
        if any(word in str(error).lower() for word in ("sentencepiece", "protobuf", "tiktoken", "placeholder")):
            raise ValueError(
                f"the SentencePiece tokenizer of '{name}' cannot be read; pip install sentencepiece protobuf ({error})"
            ) from error
        raise ValueError(
            f"no diffusers pipeline '{name}'" + (f" with variant '{variant}'" if variant is not None else "") + "; "
            "expected a Hub id or a folder with model_index.json, and 'variant' if the weights have one: "
            + (str(error) if Path(name).exists() else download_problem(error, "model_index.json"))
        ) from error
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(
            f"'{name}' is a {type(pipe).__name__}, which takes no prompt; expected a text-to-image pipeline. For a "
            f"decoder such as Kandinsky's, README.md must name its prior, as on the Hub ({reason})"
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(runtime.device)


def _announce_download(name: str, revision: str | None, runtime: Runtime) -> None:
    """Logs to which folder the weights will be downloaded, if they are not on this machine."""
    if Path(name).exists() or availability_problem(name, revision):
        return
    if local_file(name, "model_index.json", revision) is None:
        slow = "; sampling on a CPU may take minutes per image" if runtime.device == "cpu" else ""
        log.info("downloading the weights of %s, often many GB, to %s%s", name, constants.HF_HUB_CACHE, slow)


def base_pipeline(backbone: Any, dtype: torch.dtype, components: dict[str, Any]) -> Any:
    """Loads the diffusers pipeline from which a backbone was loaded, with some components replaced.

    Args:
        backbone: config of the backbone.
        dtype: dtype of the components that are loaded.
        components: name -> module, used instead of the component of the checkpoint; None omits the component.

    Raises:
        ValueError: if the backbone's checkpoint is not a folder or Hub id in diffusers layout.
    """
    name = getattr(backbone, "checkpoint", None)
    if name is None or getattr(backbone, "single_file", False):
        raise ValueError(
            f"the backbone '{backbone.name}' has no pipeline; expected a folder or Hub id in diffusers layout, "
            f"got the checkpoint {name!r}"
        )
    name = resolve_checkpoint(name)
    source = {key: value for key in ("revision", "variant") if (value := getattr(backbone, key, None)) is not None}
    if subfolder := getattr(backbone, "subfolder", None):  # pipelines do not support subfolders
        name = str(Path(_download(name, subfolder, source.pop("revision", None))) / subfolder)
    return library.DiffusionPipeline.from_pretrained(name, **source, **{DTYPE: dtype}, **components)


def _download(name: str, subfolder: str, revision: str | None) -> str:
    if Path(name).exists():
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(name, revision=revision, allow_patterns=f"{subfolder}/*")
