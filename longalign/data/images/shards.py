"""Finds the tar files (shards) of a path with a range or wildcards. Importing this module does not import torch."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from glob import glob
from pathlib import Path


def find_shards(pattern: str) -> list[Path]:
    """Returns the tar files that a path stands for, in the order of the numbers or the names.

    Args:
        pattern: path of a file, which may have ranges ``{0000..0123}`` (both ends included), and wildcards such as
            ``*``.

    Raises:
        FileNotFoundError: if no file matches a wildcard, any other file is missing, or a range starts with its higher
            number.
    """
    return list(_expand(pattern))


def _expand(pattern: str) -> Iterator[Path]:
    span = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    if span:
        start, stop = span.groups()
        if int(start) > int(stop):
            raise FileNotFoundError(f"no shard {pattern}: {start} is more than {stop}; write the lower number first")
        for number in range(int(start), int(stop) + 1):
            yield from _expand(f"{pattern[: span.start()]}{number:0{len(start)}d}{pattern[span.end() :]}")
        return
    paths = sorted(glob(pattern)) if any(wildcard in pattern for wildcard in "*?[") else [pattern]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"no shard {missing[0] if missing else pattern}; correct the path in 'shards'")
    yield from map(Path, paths)


def shard_problem(pattern: str) -> str:
    """Returns the error message of `find_shards` for ``pattern``; empty if all its files exist."""
    try:
        deque(_expand(pattern), maxlen=0)
    except FileNotFoundError as error:
        return str(error)
    return ""
