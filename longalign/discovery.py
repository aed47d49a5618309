"""Finds the encoders, rewards and other parts that installed distributions register by entry points.

The distributions are not imported. `importlib.metadata.entry_points` re-reads all metadata on each call and fails if
one file is malformed. Here the result is cached until the search path changes, and a malformed file is skipped and
recorded.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, EntryPoint, EntryPoints, PackageNotFoundError, distributions, version
from typing import Any

PREFIX = "longalign_"


@dataclass
class Discovered:
    """Entry points by which the installed distributions register parts of longalign, e.g. encoders and rewards.

    Attributes:
        groups: entry-point group, such as ``longalign_encoders`` -> name of a part -> entry points of that name.
        malformed: ``(distribution, error)`` for each distribution whose entry-point metadata cannot be read.
        misnamed: entry points in groups without the separator ``_`` after ``longalign``, such as
            ``longalign.encoders``.
    """

    groups: dict[str, dict[str, list[EntryPoint]]] = field(default_factory=dict)
    malformed: list[tuple[str, str]] = field(default_factory=list)
    misnamed: list[EntryPoint] = field(default_factory=list)


_entry_points: Any = Distribution.entry_points.fget  # type: ignore[attr-defined]
_cache: tuple[object, Discovered] | None = None


def discover() -> Discovered:
    """Returns longalign's entry points of all distributions on ``sys.path``.

    The result is cached. The entry points are re-read when ``sys.path`` or one of its folders changes.
    """
    global _cache
    state = tuple((entry, _modified(entry)) for entry in sys.path)
    if _cache is None or _cache[0] != state:
        _cache = (state, _read())
    return _cache[1]


def skip_unreadable() -> None:
    """Patches this process so that distributions with unreadable entry points are treated as having none.

    The packages ``catalogue``, ``pydantic`` and ``torch`` read the entry points of all installed distributions when
    they are imported. A single unreadable file would make the import fail. `discover` still records such files.
    """

    def entry_points(dist: Distribution) -> EntryPoints:
        try:
            return _entry_points(dist)
        except Exception:
            return EntryPoints()

    Distribution.entry_points = property(entry_points)  # type: ignore[assignment,misc]


def owner(entry: EntryPoint) -> str:
    """Returns the distribution that declares an entry point, as name and version, e.g. ``my-plugin 0.1``."""
    return _name(entry.dist) if entry.dist else "an unknown distribution"


def version_problem(entry: EntryPoint) -> str:
    """Returns why an entry point's distribution does not support the installed longalign; empty if it supports it.

    The distribution declares the supported versions in its requirements, e.g. ``longalign>=0.1,<0.2``. Installers
    do not check these requirements when they install without dependencies or update longalign alone.
    """
    lines = [line for line in _requires(entry.dist) if re.match(r"longalign\s*([^\w\s.-]|$)", line, re.IGNORECASE)]
    if not lines:
        return ""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirements = [Requirement(line) for line in lines]
        installed = version("longalign")
    except (InvalidRequirement, PackageNotFoundError):
        return ""
    for requirement in requirements:
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not requirement.specifier.contains(installed, prereleases=True):
            wanted = f"longalign{requirement.specifier}"
            return (
                f"it requires {wanted}, but longalign {installed} is installed; install {wanted}, or a version of "
                f"{owner(entry).partition(' ')[0]} for longalign {installed}"
            )
    return ""


@cache
def _requires(dist: Distribution | None) -> list[str]:
    try:  # each access parses the file
        return [] if dist is None else dist.requires or []
    except Exception:  # unreadable metadata
        return []


def _modified(entry: str) -> int:
    try:
        return os.stat(entry or ".").st_mtime_ns  # Path.stat takes five times as long
    except OSError:
        return 0


def _read() -> Discovered:
    out, seen = Discovered(), set()
    for dist in distributions():
        try:
            if PREFIX[:-1] not in (dist.read_text("entry_points.txt") or ""):
                continue
            # Python imports the first distribution of a name on the path; later ones are stale copies, not conflicts.
            key = str(dist.metadata["Name"] or getattr(dist, "_path", id(dist))).lower().replace("_", "-")
            if key in seen:
                continue
            seen.add(key)
            entries = [e for e in _entry_points(dist) if e.group.startswith(PREFIX[:-1])]
        except Exception as error:
            out.malformed.append((_name(dist), f"{type(error).__name__}: {error}"))
            continue
        for entry in entries:
            if not entry.group.startswith(PREFIX):
                out.misnamed.append(entry)
                continue
            registered = out.groups.setdefault(entry.group, {}).setdefault(entry.name, [])
            if entry.value not in [e.value for e in registered if e.dist is entry.dist]:
                registered.append(entry)
    return out


@cache
def _name(dist: Distribution) -> str:
    try:
        metadata = dist.metadata  # each access parses the file
        return f"{metadata['Name']} {metadata['Version']}"
    except Exception:
        return f"{getattr(dist, '_path', dist)} (unreadable metadata)"
