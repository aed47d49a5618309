"""The cells of an ablation: named variants of a base config, as checked configs. Does not import torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from longalign.config.changes import override
from longalign.config.checks import check_files
from longalign.config.parsing import CONFIG_SUFFIXES, parse_value, read_mapping
from longalign.config.run import RunConfig, to_dict
from longalign.errors import ConfigError, ConfigProblem, shorten

Changes = Mapping[str, Any]
LONGEST = 60
"""Characters of a cell's folder."""
FIXED = {
    "seed": "the training seeds are set by `seeds` (--seeds); remove it",
    "output": "each run has its own folder in the ablation's output; remove it",
}


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell of an ablation: a variant of the base config.

    Attributes:
        name: name in tables.
        changes: dotted path to value, see `longalign.override`.
        config: the changed config, with the base config's seed and output.
        trained: whether the cell is trained; otherwise its base model is measured.
    """

    name: str
    changes: Changes
    config: RunConfig
    trained: bool

    @property
    def folder(self) -> str:
        """Folder name of the cell: its name, if that is a valid and short file name.

        Otherwise invalid characters are replaced, the name is truncated, and a hash of the name is appended.
        """
        text = re.sub(r"[^\w.=,+-]+", "_", self.name).strip("_.") or "cell"
        if text == self.name and len(text) <= LONGEST:
            return text
        return f"{text[: LONGEST - 7]}-{sha256(self.name.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, eq=False)
class Run:
    """A cell and one of its training seeds; the seed is None if the cell is not trained."""

    cell: Cell
    seed: int | None
    folder: Path

    @property
    def name(self) -> str:
        return self.cell.name if self.seed is None else f"{self.cell.name}, seed {self.seed}"

    @cached_property
    def config(self) -> RunConfig:
        seed = {} if self.seed is None else {"seed": self.seed}
        return override(self.cell.config, {**seed, "output": str(self.folder / "train")})


def runs_of(cells: Sequence[Cell], seeds: Sequence[int], output: Path) -> list[Run]:
    """Returns the runs, seed by seed, so that an unfinished ablation has all cells of its first seeds."""
    return [
        Run(cell, seed if cell.trained else None, output / cell.folder / (f"seed-{seed}" if cell.trained else "base"))
        for i, seed in enumerate(seeds)
        for cell in cells
        if cell.trained or i == 0
    ]


def parse_vary(items: Sequence[str]) -> dict[str, list[Any]]:
    """Parses ``["encoder.sot=all,first", "loop.lr=1e-4,3e-4"]`` into path -> values.

    Raises:
        ConfigError: if an item is not ``path=value,value``, or repeats a path.
    """
    out: dict[str, list[Any]] = {}
    problems: list[ConfigProblem] = []
    for item in items:
        path, equals, text = item.partition("=")
        values = parse_value(f"[{text}]") if equals and path and text else None
        if not isinstance(values, list) or not values:
            problems.append((item, "expected path=value,value, e.g. encoder.sot=all,first"))
        elif path in out:
            problems.append((path, "this path is varied twice; give all its values in one --vary"))
        else:
            out[path] = values
    if problems:
        raise ConfigError(problems)
    return out


def read_cells(path: str | Path) -> dict[str, Any]:
    """Reads a file with ``vary`` (path -> values) or ``cells`` (name -> changes, or a list of changes).

    Returns:
        The arguments ``vary`` and ``cells`` of `make_cells`.

    Raises:
        ConfigError: if the file has other keys.
    """
    if Path(path).suffix not in CONFIG_SUFFIXES:
        raise ConfigError([("", f"expected a .yaml or .json file, got {path}")])
    values = read_mapping(Path(path))
    if unknown := [key for key in values if key not in ("vary", "cells")]:
        raise ConfigError([(key, f"{path}: expected 'vary' or 'cells'; remove this key") for key in unknown])
    return values


def make_cells(
    base: RunConfig, vary: Mapping[str, Sequence[Any]] | None, cells: Any = None, train: bool = True
) -> list[Cell]:
    """Returns the checked cells; the first one is the base of comparisons.

    Args:
        base: the base config.
        vary: dotted path -> values. The cells are all combinations of the values; the last path varies fastest.
        cells: instead of ``vary``: name -> changes, or a list of changes.
        train: whether cells with a trainer are trained.

    Raises:
        ConfigError: with the problems of all cells.
    """
    if (vary is None) == (cells is None):
        raise ConfigError(
            [("", f"expected either vary or cells, got {'neither' if vary is None else 'both'}; set exactly one")]
        )
    changes = _product(vary) if vary is not None else _listed(cells)
    problems: list[ConfigProblem] = []
    built: dict[str, Cell] = {}
    for name, change in changes.items():
        problems += [(f"{name}: {path}", text) for path, text in FIXED.items() if path in change]
        try:
            config = _with_cache(base, override(base, change))
            trained = train and config.trainer is not None
            check_files(config, training=trained, resumed=True, cached=False)
        except ConfigError as error:
            problems += [(f"{name}: {path}", message) for path, message in error.errors]
            continue
        if same := next((cell.name for cell in built.values() if cell.config == config), None):
            problems.append((name, f"this cell equals '{same}'; remove one of them"))
        built[name] = Cell(name, change, config, trained)
    if problems:
        raise ConfigError(problems)
    return list(built.values())


def _product(vary: Any) -> dict[str, Changes]:
    if not isinstance(vary, Mapping) or not vary or not all(isinstance(v, (list, tuple)) and v for v in vary.values()):
        raise ConfigError([("vary", f"expected paths with lists of values, got {shorten(vary)}")])
    rows = [dict(zip(vary, values, strict=True)) for values in product(*vary.values())]
    return _named(rows, list(vary))


def _listed(cells: Any) -> dict[str, Changes]:
    rows = list(cells.values()) if isinstance(cells, Mapping) else cells
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, Mapping) for row in rows):
        example = "{small: {trainer.lora.rank: 8}}"
        raise ConfigError([("cells", f"expected names with changes, e.g. {example}, got {shorten(cells)}")])
    if isinstance(cells, Mapping):
        return {str(name): row for name, row in cells.items()}
    return _named(rows, list(dict.fromkeys(path for row in rows for path in row)))


def _named(rows: Sequence[Changes], paths: Sequence[str]) -> dict[str, Changes]:
    """Names each row by its changes: the last step of a path if it is unique among them, else the path."""
    last = [path.rpartition(".")[2] for path in paths]
    short = dict(zip(paths, last, strict=True)) if len(set(last)) == len(last) else {path: path for path in paths}
    named: dict[str, Changes] = {}
    for row in rows:
        name = ",".join(f"{short[path]}={_value_text(value)}" for path, value in row.items()) or "base"
        if name in named:
            raise ConfigError([(name, "two cells have this name; remove one, or name the cells: {name: changes}")])
        named[name] = row
    return named


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("name"), str) and len(value) > 1:
        digest = sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:4]
        return f"{value['name']}-{digest}"
    if isinstance(value, Mapping) and len(value) == 1 and "name" in value:
        return str(value["name"])
    return json.dumps(value, default=str).replace('"', "").replace(" ", "")


def _with_cache(base: RunConfig, config: RunConfig) -> RunConfig:
    """Gives a cell whose cached values differ from the base config's its own subfolder of the cache."""
    if config.cache is None or base.cache is None or config.cache.folder != base.cache.folder:
        return config
    keys = [to_dict(c) for c in (base, config)]
    base_inputs, inputs = ([c["backbone"], c["encoder"], c["data"], c["loop"]["precision"]] for c in keys)
    if inputs == base_inputs:
        return config
    digest = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
    return override(config, {"cache.folder": f"{config.cache.folder}/{digest}"})


def changed_lines(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yields one line per difference of two plain values, e.g. ``loop.lr: was 0.1, is now 0.2``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from changed_lines(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: was {shorten(old)}, is now {shorten(new)}"
