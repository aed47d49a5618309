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

    If a step is repeated, as after resuming, the last value is used.
    """
    curves: dict[str, dict[float, float]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
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
