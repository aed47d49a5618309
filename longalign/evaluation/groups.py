"""Groups prompts by their length or labels, for metric tables by groups of prompts (breakdowns)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from longalign.data.prompts.sets import PromptSet, normalized
from longalign.encoders.counting import count_clip_tokens

LENGTH_EDGES = (30, 60, 120, 240)
"""Highest length in words of each group but the last."""
TOKEN_EDGES = (77, 154, 300, 500)
"""Highest length in CLIP tokens of each group but the last: one and two windows of CLIP, then the lengths of the long
prompt sets."""


def length_labels(
    prompts: Sequence[str], edges: Sequence[int] = LENGTH_EDGES, count: Callable[[str], int] | None = None
) -> list[str]:
    """Returns the name of the length group of each prompt, e.g. ``"31-60"`` or ``"over 240"``.

    Args:
        prompts: the prompts.
        edges: highest length of each group but the last, ascending.
        count: returns the length of a prompt; None counts words, separated by whitespace.
    """
    count = count or (lambda text: len(text.split()))
    names = [f"{low + 1}-{high}" for low, high in zip((0, *edges[:-1]), edges, strict=True)] + [f"over {edges[-1]}"]
    return [names[int(np.searchsorted(edges, count(prompt)))] for prompt in prompts]


def token_labels(prompts: Sequence[str], count: Callable[[str], int] = count_clip_tokens) -> list[str]:
    """Returns the token length group of each prompt: "1-77", "78-154", "155-300", "301-500" or "over 500".

    Args:
        prompts: the prompts.
        count: returns the number of tokens of a prompt with its special tokens. The default counts CLIP tokens.
    """
    return length_labels(prompts, TOKEN_EDGES, count)


def labels(prompts: PromptSet, name: str, texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the labels that a prompt set has for given texts, such as the prompts of images.

    Args:
        prompts: the prompt set.
        name: name of the labels, e.g. ``category``.
        texts: prompts of the set, in any order; a prompt may occur several times. Differences in whitespace and Unicode
            form are ignored, see `longalign.data.prompts.sets.normalized`.

    Returns:
        The labels of each text: none, one, or several. If several prompts of the set have the same text, their labels
        are joined.

    Raises:
        ValueError: if no prompt of the set has labels of this name, or a text is not in the set.
    """
    names = label_names(prompts)
    if name not in names:
        raise ValueError(f"no labels '{name}' in {prompts.name}; available: {', '.join(names) or 'none'}")
    by_text: dict[str, dict[str, None]] = {}
    for prompt in prompts.prompts:
        by_text.setdefault(normalized(prompt.text), {}).update(dict.fromkeys(prompt.labels.get(name, ())))
    keys = {text: normalized(text) for text in texts}
    if missing := [text for text, key in keys.items() if key not in by_text]:
        raise ValueError(
            f"{len(missing)} of {len(keys)} prompts are not among the {len(prompts.prompts)} of {prompts.name}, e.g. "
            f"{missing[0]!r:.80}; give the prompt set that the images were generated from"
        )
    return [tuple(by_text[keys[text]]) for text in texts]


def label_names(prompts: PromptSet) -> list[str]:
    """Returns the names of a prompt set's labels, e.g. ``["category", "length"]``, in order of first occurrence."""
    return list(dict.fromkeys(name for prompt in prompts.prompts for name in prompt.labels))


def all_labels(prompts: PromptSet, texts: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """Returns all labels of texts in a prompt set, in the format of `longalign.evaluation.MetricTable.labels`.

    Args:
        prompts: the prompt set.
        texts: prompts of the set, see `labels`.

    Returns:
        Name of the labels -> the labels of each text.

    Raises:
        ValueError: if a text is not in the set.
    """
    return {name: labels(prompts, name, texts) for name in label_names(prompts)}
