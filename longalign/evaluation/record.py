"""Reads the record of a run: curves of the log, non-default config values, the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from longalign.checkpoints.provenance import versions
from longalign.runtime import processor


def read_log(path: Path | str) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the curves of a ``log.jsonl``: name -> (steps, values).

    If a step is repeated, as after resuming, the last value is used. An unfinished last line, which a run is just
    writing, is skipped.

    Raises:
        ValueError: if another line is not a JSON mapping with a step.
    """
    curves: dict[str, dict[float, float]] = {}
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {"step": 0}
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}; expected the log of a run") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            raise ValueError(f"{path}, line {number} has no step; expected the log of a run")
        for name, value in row.items():
            if name not in ("step", "seconds") and isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.setdefault(name, {})[row["step"]] = float(value)
    return {name: (sorted(values), [values[s] for s in sorted(values)]) for name, values in curves.items()}


def non_defaults(config: BaseModel) -> dict[str, Any]:
    """Returns the config's values that differ from their defaults, and the names of its parts."""
    values = {}
    for key, info in type(config).model_fields.items():
        value = getattr(config, key)
        if key != "name" and value == info.get_default(call_default_factory=True, validated_data={}):
            continue
        values[key] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return non_defaults(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def machine_text() -> str:
    """Returns `machine` as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def machine() -> dict[str, str]:
    """Returns a description of the machine, and the versions of Python and of the packages that affect results."""
    info = {"system": platform.platform(terse=True), "processor": f"{processor()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        info["accelerator"] = torch.cuda.get_device_name()
    return info | versions()
