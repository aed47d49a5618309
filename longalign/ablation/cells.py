"""The cells of an ablation: named and checked variants of a base config. Does not import torch."""

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
"""Dotted path of a config key, e.g. "loop.lr" -> its new value."""
LONGEST = 60
"""Maximum number of characters of the folder name of a cell."""
#: config keys that a cell may not change -> why, and what to do
FIXED = {
    "seed": "the training seeds are set by `seeds` (--seeds); remove it",
    "output": "each run has its own folder in the ablation's output; remove it",
}


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell of an ablation: a variant of the base config.

    Attributes:
        name: name of the cell in tables.
        changes: dotted path of a config key -> new value, see `longalign.override`.
        config: the changed config, with the base config's seed and output.
        trained: whether models are trained with ``config``; otherwise the untrained model of ``config`` is measured.
    """

    name: str
    changes: Changes
    config: RunConfig
    trained: bool

    @property
    def folder(self) -> str:
        """Folder name of the cell: the cell's name, if it is a valid file name of at most `LONGEST` characters.

        In any other name, invalid characters are replaced, the end is truncated, and a hash of the name is appended.
        """
        text = re.sub(r"[^\w.=,+-]+", "_", self.name).strip("_.") or "cell"
        if text == self.name and len(text) <= LONGEST:
            return text
        return f"{text[: LONGEST - 7]}-{sha256(self.name.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, eq=False)
class Run:
    """One training of a cell, or the measurement of a cell that is not trained.

    Attributes:
        cell: the cell.
        seed: the training seed; None if the cell is not trained.
        folder: folder of the run, with the training in ``train`` and the images in ``images``.
    """

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
    """Returns the runs of an ablation: for a trained cell one per training seed, for any other cell a single one.

    The runs are ordered by training seed, so that an unfinished ablation has all cells of its first seeds.

    Args:
        cells: the cells.
        seeds: the training seeds.
        output: folder of the ablation.
    """
    return [
        Run(cell, seed if cell.trained else None, output / cell.folder / (f"seed-{seed}" if cell.trained else "base"))
        for i, seed in enumerate(seeds)
        for cell in cells
        if cell.trained or i == 0
    ]


def parse_vary(items: Sequence[str]) -> dict[str, list[Any]]:
    """Parses texts such as ``["encoder.sot=all,first", "loop.lr=1e-4,3e-4"]`` into path of a config key -> values.

    Raises:
        ConfigError: if an item is not ``path=value,value``, or two items have the same path.
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
    """Reads the cells of an ablation from a YAML or JSON file with the key ``vary`` or ``cells``.

    Returns:
        The content of the file, as keyword arguments of `make_cells`.

    Raises:
        ConfigError: if the file is neither YAML nor JSON, or has other keys.
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
    """Returns the checked cells of an ablation. Tables compare each other cell with the first one.

    Exactly one of ``vary`` and ``cells`` must be given.

    Args:
        base: the base config.
        vary: dotted path of a config key -> values. The cells are all combinations of the values; the last path varies
            fastest.
        cells: name of a cell -> its `Changes`, or a list of `Changes`, one per cell. From these, names such as
            ``lr=0.1,rank=8`` are made.
        train: whether cells whose config has a trainer are trained; False trains no cell.

    Raises:
        ConfigError: if a cell's config is invalid or equals that of an earlier cell, or its changes set ``seed`` or
            ``output``; the problems of all cells are listed. Also if both or neither of ``vary`` and ``cells`` are
            given.
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
        example = "{loop.lr: [1e-4, 3e-4]}"
        raise ConfigError([("vary", f"expected paths with lists of values, e.g. {example}, got {shorten(vary)}")])
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
    """Returns name of a cell -> its changes, with names such as ``lr=0.1,rank=8``.

    A name has the last key of each path, or the whole paths if two of ``paths`` have the same last key.
    """
    last = [path.rpartition(".")[2] for path in paths]
    short = dict(zip(paths, last, strict=True)) if len(set(last)) == len(last) else {path: path for path in paths}
    named: dict[str, Changes] = {}
    for row in rows:
        name = ",".join(f"{short[path]}={_value_text(value)}" for path, value in row.items()) or "base"
        if name in named:
            raise ConfigError(
                [(name, "two cells have this name; remove one of them, or name the cells: {name: changes}")]
            )
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
    """Returns the config of a cell with a cache folder that only cells with the same cached values use.

    This is a subfolder of the base config's folder if the latents or text states to cache differ from those of
    ``base``.
    """
    if config.cache is None or base.cache is None or config.cache.folder != base.cache.folder:
        return config
    keys = [to_dict(c) for c in (base, config)]
    base_inputs, inputs = ([c["backbone"], c["encoder"], c["data"], c["loop"]["precision"]] for c in keys)
    if inputs == base_inputs:
        return config
    digest = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
    return override(config, {"cache.folder": f"{config.cache.folder}/{digest}"})


def changed_lines(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yields one line per difference of two plain values, e.g. ``loop.lr: was 0.1, is now 0.2``.

    Args:
        old: the earlier value, such as a mapping of mappings.
        new: the present value.
        path: dotted path of both values, at the start of each line.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from changed_lines(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: was {shorten(old)}, is now {shorten(new)}"
