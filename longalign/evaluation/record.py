"""Reads what a report shows of a training run: curves of its log, non-default config values, the machine."""

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
    """Returns the curves in the log of a training run: name of a value -> (steps, values), by ascending step.

    If a step is repeated, as after resuming, the last value is used. The value ``seconds`` is omitted. An unfinished
    last line, which a run is just writing, is skipped.

    Args:
        path: a ``log.jsonl``, with a JSON mapping of ``step`` and named numbers in each line.

    Raises:
        ValueError: if a line other than an unfinished last one is not such a mapping.
    """
    curves: dict[str, dict[float, float]] = {}
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {"step": 0}
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is not JSON: {error}; expected the log of a training run"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            raise ValueError(
                f"{path}, line {number} has no step: {line[:80]!r}; expected the log of a training run, "
                'with lines such as {"step": 1, "loss": 0.5}'
            )
        for name, value in row.items():
            if name not in ("step", "seconds") and isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.setdefault(name, {})[row["step"]] = float(value)
    return {name: (sorted(values), [values[s] for s in sorted(values)]) for name, values in curves.items()}


def non_defaults(config: BaseModel) -> dict[str, Any]:
    """Returns the values of a config that differ from their defaults, as plain values for YAML.

    The key ``name`` of a part, such as a reward, is always included.
    """
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
    """Returns the description of the machine by `machine` as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def machine() -> dict[str, str]:
    """Returns the operating system, processor, number of torch threads and GPU of this machine, as name -> text.

    The versions of Python and of the packages that affect results are included.
    """
    info = {"system": platform.platform(terse=True), "processor": f"{processor()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        info["accelerator"] = torch.cuda.get_device_name()
    return info | versions()
