"""Rows of different lengths into groups that a model reads in one call each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

CALL_COST = 64
"""What a call of a text model costs beside its positions, in positions."""


def group_by_length(lengths: Sequence[int], *, limit: int, call_cost: int = CALL_COST) -> list[list[int]]:
    """Groups of rows of like length, so that padding and calls together cost least.

    A group is padded to its longest row. The cost of a grouping is the number of its positions, padding included, and
    ``call_cost`` for each call; groups with more than ``limit`` positions are cut afterwards.

    Args:
        lengths: positions of each row.
        limit: most positions in one call; a single row always goes through.
        call_cost: what a call costs beside its positions, in positions; with 0 no row is padded.

    Returns:
        For each call the indices of its rows, each row once, shorter rows first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    same = [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)]
    best, begins = [0], []  # of the first n lengths: the least cost, and where the last group of it begins
    for stop in range(1, len(same) + 1):
        longest, count, costs = lengths[same[stop - 1][0]], 0, {}
        for start in range(stop - 1, -1, -1):
            count += len(same[start])
            calls = -(-count // max(1, limit // longest))
            costs[start] = best[start] + longest * count + call_cost * calls
        begins.append(min(costs, key=costs.__getitem__))
        best.append(costs[begins[-1]])
    groups, stop = [], len(same)
    while stop:
        start = begins[stop - 1]
        groups.append([row for rows in same[start:stop] for row in rows])
        stop = start
    return [chunk for group in reversed(groups) for chunk in _chunks(group, lengths, limit)]


def _chunks(group: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """A group, from short to long, in as few calls as hold it, of nearly equal numbers of rows."""
    calls = -(-len(group) // max(1, limit // lengths[group[-1]]))
    bounds = [len(group) * i // calls for i in range(calls + 1)]
    return [list(group[a:b]) for a, b in pairwise(bounds)]
