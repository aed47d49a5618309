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


def natural_key(label: str) -> tuple[int, int, str]:
    """Returns a sort key of labels: by leading number; labels without one, such as ``over n``, are last."""
    digits = label.split("-")[0]
    return (0, int(digits), label) if digits.isdecimal() else (1, 0, label)
