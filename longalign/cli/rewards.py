"""Reads reward configs from ``--reward``, and builds the rewards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from longalign.config.checks import check_parts
from longalign.config.parsing import parse_source
from longalign.names import unique_name
from longalign.registry import PartConfig, rewards


def reward_configs(texts: Sequence[str]) -> dict[str, PartConfig]:
    """Returns the validated configs of the rewards of ``--reward``: display name -> config.

    The display name is the name of the reward; a repeated one gets a number, e.g. ``clip-2``.

    Args:
        texts: values of ``--reward``: names, configs in YAML or config files of rewards.

    Raises:
        ConfigError: if a config is invalid.
    """
    out: dict[str, PartConfig] = {}
    for text in texts:
        config = rewards.validate(parse_source(text))
        out[unique_name(config.name, out)] = config
    return out


def build_rewards(configs: Mapping[str, PartConfig], device: str | None) -> dict[str, Any]:
    """Returns rewards built from their configs, in eval mode: display name -> `longalign.rewards.base.Reward`.

    Args:
        configs: display name -> config, as returned by `reward_configs`.
        device: a torch device; the fastest available one if None.

    Raises:
        ConfigError: if files of a config do not exist or are invalid.
    """
    check_parts(configs)
    from longalign.rewards.base import as_reward
    from longalign.runtime import Runtime

    runtime = Runtime.detect(device=device)
    return {name: as_reward(rewards.construct(config, runtime), name).eval() for name, config in configs.items()}


@contextmanager
def offloaded_to_cpu(built: Iterable[Any], device: str | None) -> Iterator[None]:
    """Context manager: moves rewards or metrics to the CPU, to free GPU memory, and at the end to ``device``.

    ``device`` is a torch device; the fastest available one if None.
    """
    from longalign.runtime import Runtime

    for part in built:
        part.to("cpu")
    yield
    for part in built:
        part.to(Runtime.detect(device=device).device)
