"""Records the package versions of a run, and the package that provides each part of the config, such as a reward."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from longalign.config.checks import parts_of
from longalign.config.run import RunConfig
from longalign.registry import REGISTRIES

PACKAGES = ("longalign", "torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "pydantic")


def versions() -> dict[str, str]:
    """Returns name -> version of Python and of the installed packages that affect results."""
    return {"python": platform.python_version(), **_installed()}


@cache
def _installed() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)  # parses a file on each call
    return versions


def providers(config: RunConfig) -> dict[str, str]:
    """Returns the package that provides each part of a config, such as a reward.

    The keys are paths in the config, e.g. ``{"rewards.0.inner": "longalign 0.1.0"}``. Parts of unknown origin are
    omitted.
    """
    owners = {}
    for path, part in parts_of(config):
        for registry in REGISTRIES.values():
            if part.name in registry and registry.get(part.name) is type(part):
                owners[path] = registry.info(part.name).owner
    return owners
