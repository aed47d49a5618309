"""Compares two baselines of `gpu.sh` or `_check.py`: ``python benchmarks/compare.py old.json new.json``.

Rows are the same if their settings are. Fails, with exit status 1, if a row is more than 15% slower (``--slower``), if
its values differ (relative error above 1e-3 or cosine similarity below 0.999), or if it has an error that it did not
have. Rows of one baseline only are listed. With ``--ratios``, seconds are relative to the first row of their part, for
two machines.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

SETTINGS = ("name", "model", "stage", "batch", "channels_last", "compile", "cuda_graphs", "solver", "steps", "dtype",
            "checkpointing", "decode_batch", "prompts", "dropout", "guidance_interval")  # fmt: skip
ERROR, COSINE = 1e-3, 0.999


def read_rows(path: Path, ratios: bool) -> dict[str, dict[str, Any]]:
    """Settings -> row, for the rows that were timed or failed."""
    rows = {}
    for part, values in json.loads(path.read_text(encoding="utf-8")).items():
        timed = [row for row in values if "seconds" in row or "error" in row] if isinstance(values, list) else []
        unit = next((row["seconds"] for row in timed if "seconds" in row), 1.0) if ratios else 1.0
        for row in timed:
            key = ", ".join([part, *(f"{k} {row[k]}" for k in SETTINGS if not _is_default(k, row.get(k)))])
            rows[key] = {**row, **({"seconds": row["seconds"] / unit} if "seconds" in row else {})}
    return rows


def _is_default(key: str, value: Any) -> bool:
    """Whether a setting has the value of baselines that do not list it."""
    return value is None or value is False or (key, value) == ("dropout", 0.1)


def problems(old: dict[str, Any], new: dict[str, Any], slower: float) -> list[str]:
    """What got worse in a row."""
    if "error" in new:
        return [] if "error" in old else [f"fails: {new['error']}"]
    if "error" in old:
        return []
    found = []
    if new["seconds"] > slower * old["seconds"]:
        found.append(f"{new['seconds'] / old['seconds']:.2f} times as long: {old['seconds']:.4g}, {new['seconds']:.4g}")
    if "sample" in old and "sample" in new:
        a, b = old["sample"], new["sample"]
        norms = math.hypot(*a), math.hypot(*b)
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (norms[0] * norms[1])
        error = math.dist(a, b) / norms[0]
        if not (error <= ERROR and cosine >= COSINE):
            found.append(f"other values: relative error {error:.1e}, cosine {cosine:.5f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--ratios", action="store_true", help="compare seconds relative to the first row of a part")
    parser.add_argument("--slower", type=float, default=1.15, help="largest ratio of seconds that is accepted (1.15)")
    options = parser.parse_args()
    old, new = read_rows(options.old, options.ratios), read_rows(options.new, options.ratios)
    if not old.keys() & new.keys():
        sys.exit(f"{options.old} and {options.new} have no common rows; compare runs of the same parts and sizes")
    failed = False
    for key, row in new.items():
        for problem in problems(old[key], row, options.slower) if key in old else ["new"]:
            failed |= key in old
            print(f"{key}: {problem}")
    for key in old.keys() - new.keys():
        print(f"{key}: missing")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
