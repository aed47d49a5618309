"""Collects prompts, seeds and package versions for the record of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longalign.checkpoints.provenance import versions
from longalign.data.prompts.sets import prompts_hash


def provenance(prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Returns, as JSON values, the properties that two tables must have in common to be compared.

    Args:
        prompts: the prompts, each once, in their order.
        seeds: the seeds of each prompt.

    Returns:
        ``prompts`` with ``count`` and ``sha256`` (see `prompts_hash`), ``seeds``, and ``versions`` of Python
        and the packages.
    """
    return {
        "prompts": {"count": len(prompts), "sha256": prompts_hash(prompts)},
        "seeds": list(seeds),
        "versions": versions(),
    }
