"""Groups token sequences (rows) of different lengths into batches, one batch per call of a text model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

CALL_COST = 64
"""Fixed overhead of one call of a text model, as the number of token positions that take the same time."""


def group_by_length(lengths: Sequence[int], *, limit: int, call_cost: int = CALL_COST) -> list[list[int]]:
    """Groups token sequences (rows) of similar length into calls of a text model, so that the total cost is minimal.

    The cost is the number of token positions, including padding to the longest row of each group, plus ``call_cost``
    per call. A group is one call, or several if it has more than ``limit`` positions.

    Args:
        lengths: number of tokens of each row, at least 1.
        limit: maximum number of positions per call, including padding; a row of more than ``limit`` tokens gets its
            own call.
        call_cost: overhead of a call, as a number of positions. With 0, only rows of equal length share a call, so
            that nothing is padded.

    Returns:
        The row indices of each call. Each row occurs once; shorter rows come first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    equal_rows = [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)]
    # for the first n distinct lengths: the minimal cost, and the start of the last group in that grouping
    best, starts = [0], []
    for stop in range(1, len(equal_rows) + 1):
        longest, count, costs = lengths[equal_rows[stop - 1][0]], 0, {}
        for start in range(stop - 1, -1, -1):
            count += len(equal_rows[start])
            calls = -(-count // max(1, limit // longest))
            costs[start] = best[start] + longest * count + call_cost * calls
        starts.append(min(costs, key=costs.__getitem__))
        best.append(costs[starts[-1]])
    groups, stop = [], len(equal_rows)
    while stop:
        start = starts[stop - 1]
        groups.append([row for rows in equal_rows[start:stop] for row in rows])
        stop = start
    return [chunk for group in reversed(groups) for chunk in _chunks(group, lengths, limit)]


def _chunks(group: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Splits row indices, sorted by row length, into the fewest calls that ``limit`` allows, of nearly equal sizes."""
    calls = -(-len(group) // max(1, limit // lengths[group[-1]]))
    bounds = [len(group) * i // calls for i in range(calls + 1)]
    return [list(group[a:b]) for a, b in pairwise(bounds)]
