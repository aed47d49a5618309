"""Which installed distributions offer parts, read from entry-point metadata alone: nothing is imported.

`importlib.metadata.entry_points` reads all metadata anew at each call and fails as a whole when one distribution's
file is malformed; here the result is kept until the search path changes, and a malformed file is set aside by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path

PREFIX = "longalign_"


@dataclass
class Offers:
    """What the installed distributions offer.

    Attributes:
        groups: entry-point group to part name to everyone who offers it.
        malformed: owner and error of each distribution whose entry-point metadata cannot be read.
    """

    groups: dict[str, dict[str, list[EntryPoint]]] = field(default_factory=dict)
    malformed: list[tuple[str, str]] = field(default_factory=list)


_kept: tuple[object, Offers] | None = None


def offers() -> Offers:
    """The offers of all distributions on ``sys.path``; read again only when that path or one of its folders changed."""
    global _kept
    state = tuple((entry, _changed(entry)) for entry in sys.path)
    if _kept is None or _kept[0] != state:
        _kept = (state, _read())
    return _kept[1]


def owner(entry: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    return _name(entry.dist) if entry.dist else "an unknown distribution"


def _changed(entry: str) -> int:
    try:
        return Path(entry or ".").stat().st_mtime_ns
    except OSError:
        return 0


def _read() -> Offers:
    out, seen = Offers(), set()
    for dist in distributions():
        try:
            if PREFIX not in (dist.read_text("entry_points.txt") or ""):
                continue
            # The first of a name on the path is the one that Python imports; a second is a stale copy, not a rival.
            if (key := _name(dist).rpartition(" ")[0].lower().replace("_", "-")) in seen:
                continue
            seen.add(key)
            entries = [e for e in dist.entry_points if e.group.startswith(PREFIX)]
        except Exception as error:
            out.malformed.append((_name(dist), f"{type(error).__name__}: {error}"))
            continue
        for entry in entries:
            same = out.groups.setdefault(entry.group, {}).setdefault(entry.name, [])
            if entry.value not in [e.value for e in same if e.dist is entry.dist]:
                same.append(entry)
    return out


def _name(dist: Distribution) -> str:
    try:
        return f"{dist.metadata['Name']} {dist.metadata['Version']}"
    except Exception:
        return f"{getattr(dist, '_path', dist)} (unreadable metadata)"
