"""Checks that the parts of a run (backbone, encoder, trainer and so on) fit together, from their configs alone.

The base config class of each kind, such as `longalign.trainers.config.TrainerConfig`, declares what a part needs and
provides. `longalign.config.checks` checks the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longalign.errors import ConfigProblem, shorten
from longalign.registry import PartConfig
from longalign.trainers.config import TrainerConfig

#: a `longalign.config.run.RunConfig`, which uses this module to check itself
Run = Any


def problems(run: Run) -> Iterator[ConfigProblem]:
    """Yields ``(dotted path, message)`` for each conflict between keys of a run, such as a trainer without data.

    Each key of ``run`` is already validated separately.
    """
    yield from _part_problems(run)
    yield from _conditioning_problems(run)
    yield from _reward_problems(run)
    yield from _data_problems(run)
    yield from _cache_problems(run)
    for part in (run.backbone, run.encoder, *run.rewards, run.trainer, run.data):
        if part is not None:
            yield from _own_problems(part, run)


def _part_problems(run: Run) -> Iterator[ConfigProblem]:
    """Yields a problem if backbone or encoder is missing although the trainer needs it, or is set but not used by it.

    Keys of ``loop`` that only apply to a backbone are a problem if the trainer uses no backbone.
    """
    needs, name = TrainerConfig.needs, ""
    if run.trainer is not None:
        needs, name = run.trainer.needs, run.trainer.name
    for key in TrainerConfig.needs:
        if getattr(run, key) is None and key in needs:
            yield key, "this key is required"
        elif getattr(run, key) is not None and key not in needs:
            yield key, f"the trainer '{name}' uses no {key}; remove this key"
    for key in ("channels_last", "compile", "cuda_graphs", "mfu"):
        if "backbone" not in needs and getattr(run.loop, key):
            yield f"loop.{key}", f"only applies to a backbone, but the trainer '{name}' uses none; set it to false"


def _conditioning_problems(run: Run) -> Iterator[ConfigProblem]:
    if run.backbone is None or run.encoder is None:
        return
    takes, gives = run.backbone.has_pooled, run.encoder.gives_pooled()
    if None not in (takes, gives) and takes != gives:
        message = (
            f"'{run.backbone.name}' {'needs a' if takes else 'takes no'} pooled embedding, but "
            f"'{run.encoder.name}' returns {'none' if takes else 'one'}; choose a matching encoder"
        )
        yield "encoder", message


def _reward_problems(run: Run) -> Iterator[ConfigProblem]:
    if run.trainer is not None and run.rewards and not run.trainer.uses_rewards:
        message = f"'{run.trainer.name}' uses no rewards, got {len(run.rewards)}; remove them"
        yield "rewards", f"{message}, or choose the trainer 'reward'"


def _data_problems(run: Run) -> Iterator[ConfigProblem]:
    if run.data is None:
        if run.trainer is not None:
            yield "data", "this key is required with a trainer"
        return
    name, trainer = run.data.name, run.trainer
    if trainer is not None and trainer.compares_pairs and not run.data.has_pairs:
        yield (
            "data",
            f"'{trainer.name}' needs two images per prompt, but '{name}' has one; choose data of pairs, e.g. 'pairs'",
        )
    elif run.data.has_pairs and not (trainer is not None and trainer.compares_pairs):
        user = "the config has no trainer" if trainer is None else f"the trainer '{trainer.name}' takes one"
        yield "data", f"'{name}' has two images per prompt, but {user}; choose a trainer of pairs, e.g. 'denscore'"


def _cache_problems(run: Run) -> Iterator[ConfigProblem]:
    if run.cache is None:
        return
    if run.data is None:
        yield "data", "this key is required with a cache"
    elif run.backbone is None or run.encoder is None:
        yield "cache", "a cache needs a backbone and an encoder; remove this key"
    elif run.cache.latents and not run.data.has_images:
        yield "cache.latents", f"'{run.data.name}' has prompts only, no images; set it to false"
    elif not run.cache.prompts and run.cache.latents is False:
        yield "cache", "latents and prompts are both false; set at least one to true"


def _own_problems(part: PartConfig, run: Run) -> list[ConfigProblem]:
    """Returns the problems that ``part.check_run(run)`` finds, as ``(dotted path in the run's config, message)``.

    If `check_run` raises an exception, or returns something else, one problem with that message is returned.
    """
    try:
        problems = list(part.check_run(run))
        if all(isinstance(path, str) and isinstance(message, str) for path, message in problems):
            return problems
        problem = f"expected a list of (path, message) pairs of strings, got {shorten(problems)}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return [("", f"check_run of '{part.name}' ({type(part).__module__}.{type(part).__name__}) failed: {problem}")]
