"""Generates baseline images with unmodified diffusers pipelines and their own text encoders."""

from __future__ import annotations

import inspect
import logging
from ast import literal_eval
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longalign.config.solvers import SCHEDULER_CLASSES, check_negative, check_solver
from longalign.image_folder import new_index, write_images
from longalign.image_io import to_tensor
from longalign.inference.pipelines import library, load_pipeline
from longalign.runtime import Runtime

log = logging.getLogger("longalign")

#: setting of `generate` -> argument of a diffusers pipeline's call
ARGUMENTS = {
    "num_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "height": "height",
    "width": "width",
    "negative": "negative_prompt",
}
#: caption-cleaning modules -> their distributions
CLEANERS = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}


def call_kwargs(pipe: Any, **settings: Any) -> dict[str, Any]:
    """Returns settings as keyword arguments of a pipeline's call, without settings that are None.

    Args:
        pipe: a diffusers pipeline.
        **settings: ``num_steps``, ``guidance`` (scale), ``height`` and ``width`` in pixels, ``negative`` (prompt).

    Raises:
        ValueError: if the pipeline does not accept one of the settings, or ``negative`` is given with ``guidance`` 1.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    kwargs = {}
    for key, value in settings.items():
        if value is None:
            continue
        if ARGUMENTS[key] not in parameters:
            raise ValueError(f"{type(pipe).__name__} does not accept '{ARGUMENTS[key]}'; omit {key}")
        kwargs[ARGUMENTS[key]] = value
    check_negative(settings.get("negative"), settings.get("guidance"))
    return kwargs


def caption_cleaning_kwargs(pipe: Any) -> dict[str, bool]:
    """Returns the keyword argument that disables caption cleaning (of markup and URLs) if its libraries are missing.

    If the pipeline cleans captions by default and a library is missing, logs a warning and returns ``{"clean_caption":
    False}``. In all other cases, returns an empty dict. Without the argument, diffusers would skip the cleaning too,
    but warn in every call.
    """
    parameter = inspect.signature(pipe.__call__).parameters.get("clean_caption")
    missing = [name for module, name in CLEANERS.items() if find_spec(module) is None]
    if parameter is None or parameter.default is not True or not missing:
        return {}
    log.warning(
        "%s cleans captions (markup, URLs) with %s, which is not installed; captions are not cleaned. To clean them, "
        "pip install %s",
        type(pipe).__name__, " and ".join(missing), " ".join(missing),
    )  # fmt: skip
    return {"clean_caption": False}


def shorten_truncation(record: logging.LogRecord) -> bool:
    """Logging filter that shortens diffusers' message about truncated prompts, and keeps every record.

    The message lists the truncated text of all prompts, with padding; the shortened one has their number and an
    example.
    """
    head, _, listed = record.getMessage().partition(": [")
    if "truncated" in head and "<|endoftext|>" in listed:
        with suppress(SyntaxError, ValueError):  # another message
            texts = [text.replace("<|endoftext|>", "").strip() for text in literal_eval(f"[{listed}")]
            cut = [text for text in texts if text]
            record.msg, record.args = f"{head}: {len(cut)} of {len(texts)} prompts, e.g. {cut[:1]!s:.80}", ()
    return True


def set_scheduler(pipe: Any, name: str) -> None:
    """Replaces the scheduler of a diffusers pipeline by that of a solver, with the config of the replaced one.

    Args:
        pipe: the pipeline.
        name: ``"unipc"``, ``"ddim"``, ``"dpm++"`` or ``"lcm"``.

    Raises:
        ValueError: if the name is unknown, or the pipeline does not support the solver.
    """
    check_solver(name)
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
    """Generates an image for every prompt and seed with an unmodified diffusers pipeline, and writes PNG files.

    The files are those of `longalign.inference.sampling.generate`. The pipeline's own text encoders encode the prompts.
    Settings that are not given keep the pipeline's defaults. The initial noise of an image depends only on the seed. A
    warning is logged for an image that the safety checker blacks out. In a pipeline with a prior, such as Kandinsky's,
    ``num_steps`` and ``guidance`` apply to the decoder only.

    Args:
        name: Hub id, or a folder with ``model_index.json``.
        prompts: the prompts.
        output: folder for the files. Its ``metadata.jsonl`` must not list images, unless ``overwrite`` is set.
        seeds: different seeds; one image is generated per prompt and seed.
        negative: negative prompt for all images; None: none.
        batch_size: number of images generated at a time.
        progress: whether to show a progress bar.
        solver: ``"unipc"``, ``"ddim"``, ``"dpm++"`` or ``"lcm"``; None: the pipeline's own scheduler.
        runtime: device and dtype; None: the fastest available device and float32.
        revision: branch, tag or commit of the Hub repository; None: its main branch.
        variant: variant of the weight files, e.g. ``"fp16"``; None: files without a variant.
        overwrite: whether to replace the images that ``metadata.jsonl`` lists.
        **settings: ``num_steps``, ``guidance`` (scale), ``height`` and ``width`` in pixels.

    Returns:
        The rows of ``metadata.jsonl``: ``file_name``, ``prompt``, ``seed``, ``negative_prompt``, and ``truncated``,
        which is None, since it is not known what the pipeline truncates.

    Raises:
        ValueError: if the pipeline does not exist or does not support one of the settings or the image size, a seed
            occurs twice, or the folder already lists images.
    """
    new_index(output, overwrite)  # fail before weights are loaded
    pipe = load_pipeline(name, runtime or Runtime.detect(), revision, variant)
    logging.getLogger(type(pipe).__module__).addFilter(shorten_truncation)
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
        images = torch.stack([to_tensor(image.convert("RGB")) for image in output.images])
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
