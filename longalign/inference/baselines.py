"""Baselines: images from unmodified diffusers pipelines, with their own text encoders."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils import deprecation_utils
from huggingface_hub import constants
from torch import Tensor

from longalign.data.lines import new_index
from longalign.hub import absent, local_file, why
from longalign.inference.sampling import write_images
from longalign.inference.solvers import SCHEDULER_CLASSES, SOLVERS
from longalign.runtime import Runtime, resolve_checkpoint

log = logging.getLogger("longalign")

library: Any = diffusers  # lazy module: its classes are invisible to type checkers
# newer diffusers calls it "dtype" and warns about "torch_dtype"
DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
ARGUMENTS = {
    "num_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "height": "height",
    "width": "width",
    "negative": "negative_prompt",
}
#: caption-cleaning modules -> their distributions
CLEANERS = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}


def load_pipeline(name: str, runtime: Runtime, revision: str | None = None, variant: str | None = None) -> Any:
    """Loads a text-to-image pipeline. Kandinsky's decoder is combined with the prior named in its README.md.

    Args:
        name: Hub id, or a folder with ``model_index.json``.
        runtime: device and dtype.
        revision: branch, tag or commit on the Hub; also used for a prior.
        variant: weight variant, e.g. ``"fp16"``; components without such files are loaded from the default files.

    Raises:
        ValueError: if the pipeline or variant does not exist, the pipeline takes no prompt, or a local folder has a
            ``revision``.
    """
    if revision is not None and Path(name).is_dir():
        raise ValueError(f"a revision only applies to a Hub repository, and '{name}' is a local folder; omit revision")
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
            + (str(error) if Path(name).exists() else why(error, "model_index.json"))
        ) from error
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(
            f"'{name}' is a {type(pipe).__name__}, which takes no prompt; expected a text-to-image pipeline, or a "
            f"decoder with its prior named in README.md, such as Kandinsky's on the Hub ({reason})"
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(runtime.device)


def _announce_download(name: str, revision: str | None, runtime: Runtime) -> None:
    """Logs where the weights are downloaded to, if they are not cached."""
    if Path(name).exists() or absent(name, revision):
        return
    if local_file(name, "model_index.json", revision) is None:
        slow = "; sampling on a CPU may take minutes per image" if runtime.device == "cpu" else ""
        log.info("downloading the weights of %s, often many GB, to %s%s", name, constants.HF_HUB_CACHE, slow)


def call_kwargs(pipe: Any, **settings: Any) -> dict[str, Any]:
    """Settings as keyword arguments of a pipeline's call, without those that are None.

    Args:
        pipe: the pipeline.
        **settings: the keys of `ARGUMENTS`.

    Raises:
        ValueError: if the pipeline does not accept one of them.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    kwargs = {}
    for key, value in settings.items():
        if value is None:
            continue
        if ARGUMENTS[key] not in parameters:
            raise ValueError(f"{type(pipe).__name__} takes no '{ARGUMENTS[key]}'; omit {key}")
        kwargs[ARGUMENTS[key]] = value
    if settings.get("negative") is not None and settings.get("guidance") == 1:
        raise ValueError(
            "a negative prompt has no effect at guidance 1; raise the guidance or remove the negative prompt"
        )
    return kwargs


def caption_cleaning_kwargs(pipe: Any) -> dict[str, bool]:
    """``clean_caption=False``, with a warning, if a pipeline cleans captions with libraries that are not installed.

    diffusers would skip the cleaning too, and warn at every call.
    """
    parameter = inspect.signature(pipe.__call__).parameters.get("clean_caption")
    missing = [name for module, name in CLEANERS.items() if find_spec(module) is None]
    if parameter is None or parameter.default is not True or not missing:
        return {}
    log.warning(
        "%s cleans captions (markup, URLs) with %s, not installed: captions are used uncleaned; pip install %s",
        type(pipe).__name__, " and ".join(missing), " ".join(missing),
    )  # fmt: skip
    return {"clean_caption": False}


def set_scheduler(pipe: Any, name: str) -> None:
    """Replaces a pipeline's scheduler; the new one has the config of the old one.

    Raises:
        ValueError: if the name is unknown, or the scheduler does not fit the pipeline.
    """
    if name not in SOLVERS:
        raise ValueError(f"no solver '{name}'; available: {', '.join(SOLVERS)}")
    current: Any = getattr(pipe, "scheduler", None)
    scheduler_class = getattr(library, SCHEDULER_CLASSES[name])
    decoder = getattr(pipe, "decoder_pipe", None)  # of a pipeline with a prior; it passes generators to each step
    compatible = [other.__name__ for other in getattr(current, "compatibles", ())]
    if scheduler_class.__name__ not in compatible or (
        decoder is not None and "generator" not in inspect.signature(scheduler_class.step).parameters
    ):
        raise ValueError(
            f"{type(pipe).__name__} does not support the solver '{name}'; omit it to use the pipeline's own scheduler"
        )
    # other schedulers do not support a learned variance
    fixed = {"variance_type": None} if "variance_type" in current.config else {}
    pipe.scheduler = scheduler_class.from_config({**current.config, **fixed})
    if decoder is not None:
        decoder.scheduler = pipe.scheduler


def generate(
    name: str,
    prompts: Sequence[str],
    output: Path | str,
    *,
    seeds: Sequence[int] = (0,),
    negative: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
    solver: str | None = None,
    runtime: Runtime | None = None,
    revision: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """As `longalign.inference.sampling.generate`, with an unmodified diffusers pipeline.

    The pipeline encodes the prompts itself and keeps its default settings. An image's noise depends on its seed only.
    ``truncated`` is None in the rows, since the truncation of the pipeline is unknown. Images that its safety checker
    blacks out are logged as warnings. With a prior, ``num_steps`` and ``guidance`` apply to the decoder only.

    Args:
        name: Hub id, or a folder with ``model_index.json``.
        prompts: the prompts.
        output: folder for the files. Its ``metadata.jsonl`` must not list images, unless ``overwrite`` is set.
        seeds: one image per prompt and seed.
        negative: negative prompt for all images.
        batch_size: images per batch.
        progress: whether to show a progress bar.
        solver: "unipc", "ddim", "dpm++" or "lcm"; the pipeline's own scheduler if None.
        runtime: device and dtype; detected on this machine, in float32, if None.
        revision: branch, tag or commit on the Hub.
        variant: weight variant, see `load_pipeline`.
        overwrite: see `longalign.inference.sampling.generate`.
        **settings: ``num_steps``, ``guidance``, ``height``, ``width``.

    Returns:
        The rows of ``metadata.jsonl``.

    Raises:
        ValueError: if the pipeline does not exist, or does not support one of the settings or the image size.
    """
    new_index(output, overwrite)  # fail before weights are loaded
    pipe = load_pipeline(name, runtime or Runtime.detect(), revision, variant)
    if solver is not None:
        set_scheduler(pipe, solver)
    cleaning = caption_cleaning_kwargs(pipe)
    kwargs = {**call_kwargs(pipe, negative=negative, **settings), **cleaning}
    if negative is not None and hasattr(pipe, "prior_pipe"):
        # a prior samples noise for prompts and negative prompts together, but accepts generators for the prompts only
        batch_size = 1

    def sample_batch(texts: list[str], seeds: list[int]) -> Tensor:
        batch_kwargs = {**kwargs, "negative_prompt": [negative] * len(texts)} if negative is not None else kwargs
        # on the CPU with one generator per image: the same image on every device and in every batch
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = pipe(prompt=texts, generator=generators, output_type="pil", **batch_kwargs)
        for i, unsafe in enumerate(getattr(output, "nsfw_content_detected", None) or ()):
            if unsafe:
                log.warning("the safety checker blacked out seed %d of the prompt %r", seeds[i], texts[i][:60])
        images = torch.stack([_to_tensor(image) for image in output.images])
        for side, pixels in zip(("height", "width"), images.shape[2:], strict=True):
            if settings.get(side) not in (None, pixels):
                raise ValueError(
                    f"{type(pipe).__name__} generated images of {side} {pixels}, expected {settings[side]}; choose a "
                    f"supported size, such as {side} {pixels}"
                )
        return images

    source = {key: value for key, value in (("revision", revision), ("variant", variant)) if value is not None}
    config = {"pipeline": name, "class": type(pipe).__name__, **source}
    all_settings = {**settings, **cleaning, "solver": solver or type(getattr(pipe, "scheduler", None)).__name__}
    return write_images(
        output, prompts, sample_batch, seeds=seeds, negative=negative, batch_size=batch_size, progress=progress,
        config=config, settings=all_settings, overwrite=overwrite,
    )  # fmt: skip


def _to_tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def base_pipeline(backbone: Any, dtype: torch.dtype, components: dict[str, Any]) -> Any:
    """The diffusers pipeline of a backbone config's checkpoint, with some components replaced.

    Raises:
        ValueError: if the checkpoint is not a folder or Hub id in diffusers layout.
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
