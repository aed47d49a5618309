"""What can be wrong with a run's files, found before anything heavy is imported, all of it at once.

`load_config` looks at the config alone, so that a config can be read on another machine than the one it runs on; here
the files that it names are looked at. Nothing is loaded or downloaded, and torch is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from longalign.config import RunConfig, diff, load_config
from longalign.errors import ConfigError, ConfigProblem, shorten
from longalign.files import HUB_ID, checkpoint_file
from longalign.hub import BASE_MODEL, is_base_model
from longalign.registry import PartConfig


def check_files(
    config: RunConfig,
    training: bool = True,
    resumed: bool = False,
    cached: bool = True,
    sizes: Mapping[str, int | None] | None = None,
) -> None:
    """Raises `ConfigError` with all that is missing for a run on this machine, or does not go together.

    Args:
        config: the run.
        training: whether all of it is needed; backbone and encoder alone are otherwise.
        resumed: whether the output folder may have a run.
        cached: whether a cache of prompts, if the run has one, takes the place of the encoder's text models.
        sizes: sides in pixels of images to be sampled, by what they are called in messages.
    """
    keys = ("backbone", "encoder", *(("rewards", "trainer", "data") if training else ()))
    if training and cached and config.cache is not None and config.cache.prompts:
        keys = tuple(key for key in keys if key != "encoder")  # what it would say is in the cache
    problems = parts_problems({key: getattr(config, key) for key in keys})
    problems += _conditioning_problems(config)
    if config.init_from is not None:
        problems += [("init_from", problem) for problem in start_problems(config.init_from)]
    problems += _size_problems(config, {**(_sizes(config) if training else {}), **(sizes or {})})
    if training:
        problems += _folder_problems(config, resumed)
        problems += [
            (
                "loop.trackers",
                f"the tracker '{tracker}' needs a package that is not installed; install it with: pip install "
                f"{tracker}, or take it out of loop.trackers",
            )
            for tracker in config.loop.trackers
            if importlib.util.find_spec(tracker) is None
        ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def check_parts(parts: Mapping[str, Any]) -> None:
    """Raises `ConfigError` with all files that configs of parts name and that are not there."""
    if problems := parts_problems(parts):
        raise ConfigError(problems)


def parts_problems(value: Any, path: str = "") -> list[ConfigProblem]:
    """What `PartConfig.check_files` of each part says, of parts inside of parts too, with whole paths."""
    problems: list[ConfigProblem] = []
    for place, part in parts_of(value, path):
        try:
            problems += [(f"{place}.{key}" if key else place, message) for key, message in part.check_files()]
        except Exception as error:  # a plugin's
            problems.append((place, f"check_files of '{part.name}' failed: {type(error).__name__}: {error}"))
    return problems


def parts_of(value: Any, path: str = "") -> Iterator[tuple[str, PartConfig]]:
    """Every config of a part in a run, a part or a mapping of them, behind its path, e.g. ``rewards.0.inner``."""
    if isinstance(value, PartConfig):
        yield path, value
    for key, inner in _inside(value):
        yield from parts_of(inner, f"{path}.{key}" if path else key)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        yield from ((key, getattr(value, key)) for key in type(value).model_fields)
    elif isinstance(value, Mapping):
        yield from ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), inner) for i, inner in enumerate(value))


def start_problems(checkpoint: str) -> Iterator[str]:
    """Why a local checkpoint of longalign cannot be started from; one of the hub is not looked for."""
    path = Path(checkpoint)
    if is_base_model(checkpoint):
        yield BASE_MODEL.format(f"'{checkpoint}'")
    elif path.exists() or not HUB_ID.fullmatch(checkpoint) or Path(path.parts[0]).exists():
        try:
            checkpoint_file(path)
        except FileNotFoundError as error:
            yield str(error)


def _conditioning_problems(config: RunConfig) -> list[ConfigProblem]:
    if config.backbone is None or config.encoder is None:
        return []
    backbone, encoder = config.backbone, config.encoder
    try:
        (takes, takes_pooled), (gives, gives_pooled) = backbone.widths(), encoder.widths()
    except Exception as error:
        return [("encoder", f"its width is not known: {type(error).__name__}: {error}")]
    problems = []
    if takes and gives and takes != gives:
        message = f"'{encoder.name}' gives states of width {gives}, and the denoiser of '{backbone.name}' takes {takes}"
        problems.append(("encoder", f"{message}; choose an encoder made for it, or give it an adapter"))
    if takes_pooled and gives_pooled and takes_pooled != gives_pooled:
        message = f"'{encoder.name}' gives a pooled embedding of width {gives_pooled}"
        problems.append(("encoder", f"{message}, and the denoiser of '{backbone.name}' takes {takes_pooled}"))
    return problems


def _sizes(config: RunConfig) -> dict[str, Any]:
    """Sides in pixels of the images that are trained with."""
    sizes = {"trainer.resolution": getattr(config.trainer, "resolution", None)}
    if getattr(config.trainer, "needs_images", True):
        sizes["data.resolution"] = getattr(config.data, "resolution", None)
    return sizes


def _size_problems(config: RunConfig, sizes: Mapping[str, Any]) -> list[ConfigProblem]:
    """Sizes in pixels that the backbone has no latents of."""
    divisor = getattr(config.backbone, "divisor", None)
    return [
        (key, f"expected a multiple of {divisor}, as '{getattr(config.backbone, 'name', '')}' needs, got {size}")
        for key, size in sizes.items()
        if isinstance(divisor, int) and isinstance(size, int) and size % divisor
    ]


def used(config: RunConfig) -> str | None:
    """What is wrong with a run's ``output`` if a run has left checkpoints there: two are never mixed."""
    try:
        newest = checkpoint_file(Path(config.output))
    except FileNotFoundError:
        return None
    try:
        changes = {key: values for key, values in diff(load_config(newest), config).items() if key != "output"}
    except ValueError as error:
        about = f"whose newest checkpoint cannot be read ({error})"
    else:
        lines = [f"\n    {key}: {shorten(old)} there, {shorten(new)} now" for key, (old, new) in changes.items()]
        if not lines:
            advice = "resume it, choose a different output, or remove the folder"
            return f"there is a run in {config.output} already, with the same config; {advice}"
        about = f"with a different config:{''.join(lines)}\n   "
    return f"there is a run in {config.output} already, {about} choose a different output, or remove the folder"


def _folder_problems(config: RunConfig, resumed: bool) -> list[ConfigProblem]:
    problems: list[ConfigProblem] = []
    output = Path(config.output)
    if not resumed and (problem := used(config)):
        problems.append(("output", problem))
    above = next((p for p in (output, *output.parents) if p.exists()), output)
    if above.exists() and not above.is_dir():
        problems.append(("output", f"{above} is a file; expected a folder"))
    prompts = config.validation.prompts if config.validation is not None else ()
    if isinstance(prompts, str) and not Path(prompts).is_file():
        problems.append(
            ("validation.prompts", f"no file {prompts}; expected a .txt or .jsonl file, or a list of prompts")
        )
    return problems
