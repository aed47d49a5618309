"""Which installed distributions offer parts, read from entry-point metadata alone: nothing is imported.

`importlib.metadata.entry_points` reads all metadata anew at each call and fails as a whole when one distribution's
file is malformed; here the result is kept until the search path changes, and a malformed file is set aside by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, EntryPoints, distributions
from pathlib import Path
from typing import Any

PREFIX = "longalign_"


@dataclass
class Discovered:
    """What the installed distributions offer.

    Attributes:
        groups: entry-point group to part name to all that register it.
        malformed: owner and error of each distribution whose entry-point metadata cannot be read.
        misnamed: entry points whose group is like one of ours in its beginning only, such as ``longalign.encoders``.
    """

    groups: dict[str, dict[str, list[EntryPoint]]] = field(default_factory=dict)
    malformed: list[tuple[str, str]] = field(default_factory=list)
    misnamed: list[EntryPoint] = field(default_factory=list)


_entry_points: Any = Distribution.entry_points.fget  # type: ignore[attr-defined]
_kept: tuple[object, Discovered] | None = None


def discover() -> Discovered:
    """The parts of all distributions on ``sys.path``; read again only when that path or one of its folders changed."""
    global _kept
    state = tuple((entry, _changed(entry)) for entry in sys.path)
    if _kept is None or _kept[0] != state:
        _kept = (state, _read())
    return _kept[1]


def skip_unreadable() -> None:
    """Makes this process take distributions whose entry points cannot be read for such as have none.

    catalogue, pydantic and torch read the entry points of all distributions when they are imported, and would fail over
    a file that none of them needs. `discover` names it.
    """

    def entry_points(dist: Distribution) -> EntryPoints:
        try:
            return _entry_points(dist)
        except Exception:
            return EntryPoints()

    Distribution.entry_points = property(entry_points)  # type: ignore[assignment,misc]


def owner(entry: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    return _name(entry.dist) if entry.dist else "an unknown distribution"


def _changed(entry: str) -> int:
    try:
        return Path(entry or ".").stat().st_mtime_ns
    except OSError:
        return 0


def _read() -> Discovered:
    out, seen = Discovered(), set()
    for dist in distributions():
        try:
            if PREFIX[:-1] not in (dist.read_text("entry_points.txt") or ""):
                continue
            # The first of a name on the path is the one that Python imports; a second is a stale copy, not a rival.
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
            same = out.groups.setdefault(entry.group, {}).setdefault(entry.name, [])
            if entry.value not in [e.value for e in same if e.dist is entry.dist]:
                same.append(entry)
    return out


def _name(dist: Distribution) -> str:
    try:
        return f"{dist.metadata['Name']} {dist.metadata['Version']}"
    except Exception:
        return f"{getattr(dist, '_path', dist)} (unreadable metadata)"
