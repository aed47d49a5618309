"""Changes and lists values of a run's config by dotted path, such as ``loop.lr``, and compares two configs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from longalign.config.parsing import parse_value
from longalign.config.run import RunConfig, load_config, to_dict
from longalign.errors import ConfigError, ConfigProblem, shorten, suggestion


def override(config: Mapping[str, Any] | str | Path | RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Returns a validated copy of a config with changed values.

    A part (backbone, encoder, reward and so on) that is set to a name alone gets the defaults of that part for all its
    keys.

    Args:
        config: a mapping, a file, a checkpoint or a `RunConfig`, as for `longalign.config.run.load_config`.
        changes: dotted path -> new value, applied in order, e.g. ``{"encoder": "t5", "rewards.0.omega": 0.0}``. A
            number in a path is an index in a list, counted from 0.

    Raises:
        ConfigError: if a path does not exist, or the config is invalid, originally or after the changes.
        FileNotFoundError: if ``config`` is a file that does not exist.
    """
    tree = to_dict(load_config(config))
    problems: list[ConfigProblem] = []
    for path, value in changes.items():
        try:
            _set_path(tree, path, plain(value))
        except LookupError as error:
            problems.append((shorten(path) if not isinstance(path, str) else path, str(error.args[0])))
    if problems:
        raise ConfigError(problems)
    return load_config(tree)


def parse_assignments(items: Sequence[str]) -> dict[str, Any]:
    """Parses ``["encoder=t5", "loop.lr=1e-4"]`` into ``{"encoder": "t5", "loop.lr": 1e-4}``, as `override` takes it.

    Values are parsed by `longalign.config.parsing.parse_value`.

    Raises:
        ConfigError: if an item is not ``path=value``, or two items have the same path; lists all such items.
    """
    out: dict[str, Any] = {}
    problems = []
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path:
            problems.append((item, "expected path=value, e.g. loop.lr=1e-4"))
        elif path in out:
            problems.append((path, "this path is given twice; remove one of them"))
        else:
            out[path] = parse_value(text)
    if problems:
        raise ConfigError(problems)
    return out


def diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the differences of two configs: dotted path -> ``(value in a, value in b)``, as JSON values.

    Two parts with different names are one difference, and so are two lists of different lengths. `override` of ``a``
    with the second values gives ``b``.
    """
    return dict(_differences("", to_dict(a), to_dict(b)))


def _differences(path: str, a: Any, b: Any) -> list[tuple[str, tuple[Any, Any]]]:
    same_structure = type(a) is type(b) and len(a) == len(b) if isinstance(a, (dict, list)) else False
    if isinstance(a, dict) and same_structure:
        same_structure = a.keys() == b.keys() and a.get("name") == b.get("name")
    if not same_structure:
        return [] if a == b and type(a) is type(b) else [(path, (a, b))]
    pairs = ((k, a[k], b[k]) for k in a) if isinstance(a, dict) else ((str(i), a[i], b[i]) for i in range(len(a)))
    return [d for key, x, y in pairs for d in _differences(f"{path}.{key}" if path else key, x, y)]


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ``(dotted path, value)`` for each value in nested mappings; a list is one value.

    Every yielded path starts with ``path``, the dotted path of ``value`` (empty for a whole config).
    """
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from flatten(child, f"{path}.{key}" if path else key)
    else:
        yield path, value


def plain(value: Any) -> Any:
    """Returns a config object as a mapping of JSON values, and any other value unchanged."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _set_path(tree: Any, path: str, value: Any) -> None:
    if not isinstance(path, str):
        raise LookupError("expected a dotted path of keys, e.g. 'encoder.max_tokens'")
    *parents, last = path.split(".")
    for depth, step in enumerate(parents):
        tree = tree[_resolve_step(tree, step, ".".join(parents[:depth]))]
    # a new key of a mapping is checked by validation
    key: Any = last if isinstance(tree, dict) else _resolve_step(tree, last, ".".join(parents))
    old = tree.get(key) if isinstance(tree, dict) else tree[key]
    if isinstance(value, str) and isinstance(old, dict) and "name" in old:
        value = {"name": value}  # later changes may set keys of the new part
    tree[key] = value


def _resolve_step(tree: Any, step: str, parent: str) -> Any:
    """Returns the key of a mapping, or the index in a list, that one step of a dotted path names.

    Args:
        tree: the mapping or list.
        step: text between two dots of the path.
        parent: dotted path of ``tree``, for messages; empty for the whole config.

    Raises:
        LookupError: if the key or index does not exist, or ``tree`` is neither a mapping nor a list.
    """
    if isinstance(tree, dict):
        if step not in tree:
            hint = suggestion(step, map(str, tree)) or f"; available: {', '.join(map(str, tree))}"
            raise LookupError(f"no key '{step}'{f' in {parent}' if parent else ''}{hint}")
        return step
    if isinstance(tree, list):
        if not re.fullmatch("[0-9]{1,9}", step) or int(step) >= len(tree):
            if not tree:
                raise LookupError(f"no entry '{step}' in {parent}, which is empty; set {parent} as a whole")
            raise LookupError(f"no entry '{step}' in {parent}; expected an index from 0 to {len(tree) - 1}")
        return int(step)
    raise LookupError(f"{parent} is {shorten(tree)} and has no keys; set {parent} as a whole")
