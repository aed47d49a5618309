"""Groups prompts for the breakdowns of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LENGTH_EDGES = (30, 60, 120, 240)


def length_labels(
    prompts: Sequence[str], edges: Sequence[int] = LENGTH_EDGES, count: Callable[[str], int] | None = None
) -> list[str]:
    """Returns the length bucket of each prompt, e.g. ``"31-60"``. ``count`` measures the length (default: words)."""
    count = count or (lambda text: len(text.split()))
    names = [f"{low + 1}-{high}" for low, high in zip((0, *edges[:-1]), edges, strict=True)] + [f"over {edges[-1]}"]
    return [names[int(np.searchsorted(edges, count(prompt)))] for prompt in prompts]


def natural_order(labels: Sequence[str]) -> list[str]:
    """Returns the distinct labels, sorted by leading number. Labels such as ``over n`` are last."""

    def key(name: str) -> tuple[int, float, str]:
        digits = name.split("-")[0]
        return (0, float(digits), name) if digits.isdigit() else (1, 0.0, name)

    return sorted(set(labels), key=key)
