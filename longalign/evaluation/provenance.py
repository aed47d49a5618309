"""Collects the prompts, seeds and package versions that a stored metric table came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longalign.checkpoints.provenance import versions
from longalign.data.prompts.sets import prompts_hash


def provenance(prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Returns what two metric tables must have in common to be comparable, as plain values for JSON.

    Args:
        prompts: the prompts, each once, in their order.
        seeds: the noise seeds with which an image of each prompt was generated.

    Returns:
        ``prompts``, with their ``count`` and ``sha256`` (see `longalign.data.prompts.sets.prompts_hash`); ``seeds``;
        and ``versions`` of Python and of the packages that affect results.
    """
    return {
        "prompts": {"count": len(prompts), "sha256": prompts_hash(prompts)},
        "seeds": list(seeds),
        "versions": versions(),
    }
