"""Checks a run's files before heavy modules are imported, and reports all problems at once.

`longalign.config.run.load_config` only checks the config itself, so that configs can be read on other machines. The
checks here also read the files that a config refers to. They load no weights, download nothing and do not import torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from longalign.config.changes import diff
from longalign.config.run import RunConfig, load_config
from longalign.data.prompts.sets import read_prompt_set
from longalign.errors import ConfigError, ConfigProblem, shorten
from longalign.files.paths import check_folder, checkpoint_file, local_checkpoint
from longalign.registry import PartConfig
from longalign.sizes import Size, parse_size


def check_files(
    config: RunConfig,
    training: bool = True,
    resumed: bool = False,
    cached: bool = True,
    sizes: Mapping[str, Sequence[Size]] | None = None,
) -> None:
    """Checks that this machine has what a run needs.

    Problems are missing or invalid files, an encoder output of a width that the denoiser does not accept, image sizes
    that the backbone cannot encode, missing packages, and an output folder that already contains checkpoints.

    Args:
        config: config of the run.
        training: whether to check the whole run; if False, only backbone, encoder, ``init_from`` and ``sizes``.
        resumed: whether the output folder may contain checkpoints.
        cached: whether the encoder's files may be missing if encoded prompts are read from a cache (``cache.prompts``).
        sizes: further image sizes in pixels that the backbone must be able to encode: name used in messages -> sizes,
            e.g. ``{"--size": [Size(512, 512)]}``.

    Raises:
        ConfigError: if there are problems; lists all of them.
    """
    keys = ("backbone", "encoder", *(("rewards", "trainer", "data", "monitor") if training else ()))
    if training and cached and config.cache is not None and config.cache.prompts:
        keys = tuple(key for key in keys if key != "encoder")  # the cache replaces the text models
    problems = parts_problems({key: getattr(config, key) for key in keys})
    problems += _conditioning_problems(config)
    if config.init_from is not None:
        try:
            local_checkpoint(config.init_from)  # a checkpoint on the Hub is not checked
        except FileNotFoundError as error:
            problems.append(("init_from", str(error)))
    problems += size_problems(config, {**(_sizes(config) if training else {}), **(sizes or {})})
    if training:
        problems += _folder_problems(config, resumed)
        problems += [
            (
                "loop.trackers",
                f"the tracker '{tracker}' needs a package that is not installed; install it with: pip install "
                f"{tracker}, or remove it from loop.trackers",
            )
            for tracker in config.loop.trackers
            if importlib.util.find_spec(tracker) is None
        ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def check_parts(parts: Mapping[str, Any]) -> None:
    """Calls `PartConfig.check_files` of several configs and of the configs nested in them.

    Args:
        parts: name used in messages -> config of an encoder, reward or other part.

    Raises:
        ConfigError: if there are problems; lists all of them.
    """
    if problems := parts_problems(parts):
        raise ConfigError(problems)


def parts_problems(value: Any, path: str = "") -> list[ConfigProblem]:
    """Calls `PartConfig.check_files` of each config in ``value``; returns ``(dotted path, message)`` for each problem.

    ``value`` and ``path`` are as for `parts_of`. An exception in `check_files` becomes a problem too.
    """
    problems: list[ConfigProblem] = []
    for part_path, part in parts_of(value, path):
        try:
            problems += [(f"{part_path}.{key}" if key else part_path, message) for key, message in part.check_files()]
        except Exception as error:  # check_files of a plugin may raise anything
            problem = f"check_files of '{part.name}' failed: {type(error).__name__}: {error}; report it to its author"
            problems.append((part_path, problem))
    return problems


def parts_of(value: Any, path: str = "") -> Iterator[tuple[str, PartConfig]]:
    """Yields ``(dotted path, config)`` for each `PartConfig` in ``value``, outer ones before those nested in them.

    Args:
        value: config of a run or of a part, or a mapping or list of configs.
        path: dotted path of ``value``, to which paths such as ``rewards.0.inner`` are appended.
    """
    if isinstance(value, PartConfig):
        yield path, value
    for key, child in _children(value):
        yield from parts_of(child, f"{path}.{key}" if path else key)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        yield from ((key, getattr(value, key)) for key in type(value).model_fields)
    elif isinstance(value, Mapping):
        yield from ((str(key), child) for key, child in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), child) for i, child in enumerate(value))


def _conditioning_problems(config: RunConfig) -> list[ConfigProblem]:
    if config.backbone is None or config.encoder is None:
        return []
    backbone, encoder = config.backbone, config.encoder
    try:
        (expected, expected_pooled), (width, pooled_width) = backbone.widths(), encoder.widths()
    except Exception as error:
        return [
            ("encoder", f"widths() of '{backbone.name}' or '{encoder.name}' failed: {type(error).__name__}: {error}")
        ]
    problems = []
    if expected and width and expected != width:
        message = (
            f"'{encoder.name}' has states of width {width}, but the denoiser of '{backbone.name}' expects {expected}"
        )
        problems.append(("encoder", f"{message}; choose a matching encoder, or add an adapter"))
    if expected_pooled and pooled_width and expected_pooled != pooled_width:
        message = f"'{encoder.name}' has a pooled embedding of width {pooled_width}"
        expectation = f"but the denoiser of '{backbone.name}' expects {expected_pooled}; choose a matching encoder"
        problems.append(("encoder", f"{message}, {expectation}"))
    return problems


def _sizes(config: RunConfig) -> dict[str, Sequence[Size]]:
    """Returns the sizes of training images and of the monitor's images, by the config key that sets them."""
    sizes: dict[str, Sequence[Size]] = {}
    if config.trainer is not None:
        sizes |= {f"trainer.{key}": value for key, value in config.trainer.image_sizes.items()}
    if config.data is not None and (config.trainer is None or config.trainer.needs_images):
        sizes |= {f"data.{key}": value for key, value in config.data.image_sizes.items()}
    if config.monitor is not None and config.monitor.size is not None:
        sizes["monitor.size"] = [parse_size(config.monitor.size)]
    return sizes


def size_problems(config: RunConfig, sizes: Mapping[str, Sequence[Size]]) -> list[ConfigProblem]:
    """Returns ``(key, message)`` for each key with a size that the backbone cannot encode to latents.

    Args:
        config: config of the run. If it has no backbone, or if the backbone's files are not on this machine, nothing is
            checked.
        sizes: key or option that sets the sizes -> sizes in pixels.
    """
    if config.backbone is None or (divisor := config.backbone.divisor) is None:
        return []
    unfit = {k: next((s for s in v if s.height % divisor or s.width % divisor), None) for k, v in sizes.items()}
    return [
        (key, f"expected multiples of {divisor} pixels for '{config.backbone.name}', got {size}; change the size")
        for key, size in unfit.items()
        if size is not None
    ]


def output_problem(config: RunConfig) -> str | None:
    """Returns a message if the folder ``config.output`` already contains a checkpoint, else None.

    The message lists the keys whose values in ``config`` differ from those in the newest checkpoint.
    """
    try:
        newest = checkpoint_file(Path(config.output))
    except FileNotFoundError:
        return None
    try:
        changes = {key: values for key, values in diff(load_config(newest), config).items() if key != "output"}
    except ValueError as error:
        state = f"and its newest checkpoint cannot be read ({error});"
    else:
        lines = [f"\n    {key}: was {shorten(old)}, is now {shorten(new)}" for key, (old, new) in changes.items()]
        if not lines:
            advice = "resume it, choose a different output, or remove the folder"
            return f"there is a run in {config.output} already, with the same config; {advice}"
        state = f"with a different config:{''.join(lines)}\n   "
    return f"there is a run in {config.output} already, {state} choose a different output, or remove the folder"


def _folder_problems(config: RunConfig, resumed: bool) -> list[ConfigProblem]:
    problems: list[ConfigProblem] = []
    if not resumed and (problem := output_problem(config)):
        problems.append(("output", problem))
    try:
        check_folder(Path(config.output))
    except ValueError as error:
        problems.append(("output", str(error)))
    prompts = config.monitor.prompts if config.monitor is not None else None
    if isinstance(prompts, str):
        try:
            read_prompt_set(prompts)
        except (ValueError, OSError) as error:
            problems.append(("monitor.prompts", str(error)))
    return problems
