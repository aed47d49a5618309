"""Images of stock diffusers pipelines, with their own text encoders: the models to compare with."""

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
from longalign.pipeline import SOLVERS, write_images
from longalign.runtime import Runtime, resolve_checkpoint

log = logging.getLogger("longalign")

library: Any = diffusers  # its classes are made on demand, which type checkers cannot see
# diffusers renames it, and warns of the old name where it takes both
DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
ARGUMENTS = {
    "num_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "height": "height",
    "width": "width",
    "negative": "negative_prompt",
}
#: what cleans captions, with the names that they are installed by
CLEANERS = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}
SCHEDULER_CLASSES = {
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


def load_pipeline(name: str, runtime: Runtime, revision: str | None = None, variant: str | None = None) -> Any:
    """A text-to-image pipeline of diffusers. Kandinsky's decoder is joined with the prior that its README.md names.

    Args:
        name: hub id, or a folder with ``model_index.json``.
        runtime: device and dtype.
        revision: branch, tag or commit on the hub, of a prior too.
        variant: file variant, e.g. ``"fp16"``; parts that have no such files are read from those without.

    Raises:
        ValueError: if there is none, or none of that variant, or it takes no prompt, or a folder has a ``revision``.
    """
    if revision is not None and Path(name).is_dir():
        raise ValueError(f"a revision is of a repository on the hub, and '{name}' is a folder here; leave it out")
    name = resolve_checkpoint(name)
    _announce_download(name, revision, runtime)
    settings: dict[str, Any] = {DTYPE: runtime.torch_dtype, "revision": revision, "variant": variant}
    reason = ""
    try:
        try:
            pipe = library.AutoPipelineForText2Image.from_pretrained(name, **settings)
        except ValueError as error:  # a class that AutoPipeline does not know, or one that lacks its prior
            reason = str(error)
            pipe = library.DiffusionPipeline.from_pretrained(name, **settings)
    except (ImportError, OSError, ValueError) as error:
        # what stands for a class whose library is not here is called so in transformers 4
        if any(word in str(error).lower() for word in ("sentencepiece", "protobuf", "tiktoken", "placeholder")):
            raise ValueError(
                f"the tokenizer of '{name}' is a SentencePiece file, which cannot be read here; "
                f"pip install sentencepiece protobuf ({error})"
            ) from error
        raise ValueError(
            f"no diffusers pipeline '{name}'" + (f" of the variant '{variant}'" if variant is not None else "") + "; "
            "expected a hub id or a folder with model_index.json, and a variant if its weights are of one: "
            + (str(error) if Path(name).exists() else why(error, "model_index.json"))
        ) from error
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(
            f"'{name}' is a {type(pipe).__name__}, which takes no prompt; expected text-to-image, or a decoder whose "
            f"README.md names its prior, as Kandinsky's does on the hub ({reason})"
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(runtime.device)


def _announce_download(name: str, revision: str | None, runtime: Runtime) -> None:
    """Says that weights come from the hub, and where to, if they are not on this machine."""
    if Path(name).exists() or absent(name, revision):
        return
    if local_file(name, "model_index.json", revision) is None:
        slow = "; sampling on a CPU may then take minutes an image" if runtime.device == "cpu" else ""
        log.info("downloading the weights of %s, often many GB, to %s%s", name, constants.HF_HUB_CACHE, slow)


def arguments(pipe: Any, **settings: Any) -> dict[str, Any]:
    """Settings by the names that a pipeline's call has for them, without those that are None.

    Args:
        pipe: the pipeline.
        **settings: of `ARGUMENTS`.

    Raises:
        ValueError: if the pipeline takes one of them not.
    """
    takes = inspect.signature(pipe.__call__).parameters
    out = {}
    for key, value in settings.items():
        if value is None:
            continue
        if ARGUMENTS[key] not in takes:
            raise ValueError(f"{type(pipe).__name__} takes no '{ARGUMENTS[key]}'; leave out {key}")
        out[ARGUMENTS[key]] = value
    if settings.get("negative") is not None and settings.get("guidance") == 1:
        raise ValueError("a negative prompt does nothing at guidance 1; raise the guidance or leave the prompt out")
    return out


def cleaning(pipe: Any) -> dict[str, bool]:
    """``clean_caption=False`` for a pipeline that would clean captions with libraries that are not here, and a warning.

    diffusers leaves the cleaning out by itself then, and says so at every call.
    """
    cleans = inspect.signature(pipe.__call__).parameters.get("clean_caption")
    lacking = [name for module, name in CLEANERS.items() if find_spec(module) is None]
    if cleans is None or cleans.default is not True or not lacking:
        return {}
    log.warning(
        "%s would clean captions (markup, addresses) but %s is not installed, so it reads them as they are; "
        "pip install %s", type(pipe).__name__, " and ".join(lacking), " ".join(lacking),
    )  # fmt: skip
    return {"clean_caption": False}


def set_scheduler(pipe: Any, name: str) -> None:
    """Gives a pipeline another scheduler with the constants of its own.

    Raises:
        ValueError: if there is no scheduler of that name, or it does not go with the pipeline.
    """
    if name not in SOLVERS:
        raise ValueError(f"no solver '{name}'; available: {', '.join(SOLVERS)}")
    own: Any = getattr(pipe, "scheduler", None)
    kind = getattr(library, SCHEDULER_CLASSES[name])
    decoder = getattr(pipe, "decoder_pipe", None)  # what draws, where there is a prior; it gives generators to a step
    fitting = [other.__name__ for other in getattr(own, "compatibles", ())]
    if kind.__name__ not in fitting or (
        decoder is not None and "generator" not in inspect.signature(kind.step).parameters
    ):
        raise ValueError(f"{type(pipe).__name__} cannot be drawn with '{name}'; leave out the scheduler to use its own")
    # of a learned variance, which goes with the scheduler that the model was trained for, the others know nothing
    fixed = {"variance_type": None} if "variance_type" in own.config else {}
    pipe.scheduler = kind.from_config({**own.config, **fixed})
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
    """As `longalign.pipeline.generate`, by a stock pipeline with its own text handling and, where nothing else is said,
    its own settings.

    An image's noise follows from its seed alone. What the pipeline does not read of a prompt is not known, so ``cut``
    is None in the rows. Images that a pipeline blackens as unsafe are named in a warning. A pipeline with a prior takes
    ``num_steps`` and ``guidance`` for its decoder; the prior keeps its own.

    Args:
        name: hub id, or a folder with ``model_index.json``.
        prompts: the prompts.
        output: folder for the files; one that already has a ``metadata.jsonl`` is refused.
        seeds: each prompt is drawn once for each seed.
        negative: what to stay away from.
        batch_size: images drawn at a time.
        progress: whether to show a bar over the images.
        solver: "unipc", "ddim", "dpm++" or "lcm".
        runtime: device and dtype; this machine's, in float32, if None.
        revision: branch, tag or commit on the hub.
        variant: file variant, as for `load_pipeline`.
        overwrite: as for `longalign.pipeline.generate`.
        **settings: ``num_steps``, ``guidance``, ``height``, ``width``.

    Raises:
        ValueError: if there is no such pipeline, or it does not take one of the settings, or not that size.
    """
    new_index(output, overwrite)  # before weights are loaded
    pipe = load_pipeline(name, runtime or Runtime.detect(), revision, variant)
    if solver is not None:
        set_scheduler(pipe, solver)
    cleaned = cleaning(pipe)
    given = {**arguments(pipe, negative=negative, **settings), **cleaned}
    if negative is not None and hasattr(pipe, "prior_pipe"):
        # it draws noise for prompts and negative prompts together, and takes generators for the prompts alone
        batch_size = 1

    def draw(texts: list[str], numbers: list[int]) -> Tensor:
        own = {**given, "negative_prompt": [negative] * len(texts)} if negative is not None else given
        # on the CPU, one for each image, so that an image is the same on every device and in every batch
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        drawn = pipe(prompt=texts, generator=generators, output_type="pil", **own)
        for i, unsafe in enumerate(getattr(drawn, "nsfw_content_detected", None) or ()):
            if unsafe:
                log.warning("the safety checker blackened seed %d of the prompt %r", numbers[i], texts[i][:60])
        images = torch.stack([_tensor(image) for image in drawn.images])
        for side, pixels in zip(("height", "width"), images.shape[2:], strict=True):
            if settings.get(side) not in (None, pixels):
                raise ValueError(
                    f"{type(pipe).__name__} drew images of {side} {pixels} instead of {settings[side]}; ask for a size "
                    "that it can draw, such as this one"
                )
        return images

    chosen = {key: value for key, value in (("revision", revision), ("variant", variant)) if value is not None}
    about = {"pipeline": name, "class": type(pipe).__name__, **chosen}
    about_settings = {**settings, **cleaned, "solver": solver or type(getattr(pipe, "scheduler", None)).__name__}
    return write_images(
        output, prompts, draw, seeds=seeds, negative=negative, batch_size=batch_size, progress=progress,
        config=about, settings=about_settings, overwrite=overwrite,
    )  # fmt: skip


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def base_pipeline(backbone: Any, dtype: torch.dtype, components: dict[str, Any]) -> Any:
    """The pipeline of the checkpoint that a backbone's config names, with some components in the place of its own.

    Raises:
        ValueError: if the config names no folder and no hub id.
    """
    name = getattr(backbone, "checkpoint", None)
    if name is None or getattr(backbone, "single_file", False):
        raise ValueError(f"'{backbone.name}' is not of a folder or hub id in diffusers layout, so it has no pipeline")
    name = resolve_checkpoint(name)
    where = {key: value for key in ("revision", "variant") if (value := getattr(backbone, key, None)) is not None}
    if subfolder := getattr(backbone, "subfolder", None):  # a pipeline is read from the top of a folder only
        name = str(Path(_download(name, subfolder, where.pop("revision", None))) / subfolder)
    return library.DiffusionPipeline.from_pretrained(name, **where, **{DTYPE: dtype}, **components)


def _download(name: str, subfolder: str, revision: str | None) -> str:
    if Path(name).exists():
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(name, revision=revision, allow_patterns=f"{subfolder}/*")
