"""Reads configs from YAML and JSON files and from checkpoints, and parses values of the command line.

Importing this module does not import torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from longalign.errors import MAX_DEPTH, MAX_VALUES, ConfigError, check_size, shorten, suggestion
from longalign.files.paths import checkpoint_file, read_metadata
from longalign.runtime import examples_folder

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
SOURCE_SUFFIXES = (*CONFIG_SUFFIXES, ".safetensors")
"""Suffixes of files that contain a config: config files and checkpoints."""
BOOL, INT, FLOAT, TIME, VALUE, MERGE = (
    f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "value", "merge")
)
#: maximum number of characters in a config file
MAX_CHARACTERS = 2**20


class _Loader(yaml.SafeLoader):
    """PyYAML loader with the scalars of YAML 1.2: ``no`` and ``1:30`` are strings, ``1e-4`` is a number.

    A repeated key, or a tag such as ``!!set``, is an error.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        character: [(tag, pattern) for tag, pattern in resolvers if tag not in (BOOL, INT, FLOAT, TIME, VALUE)]
        for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _merged = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the tag '{event.tag}' is not supported; remove it", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != MERGE:
                name = self.construct_object(key, deep=True)
                if isinstance(name, (list, dict)):
                    message = f"{shorten(name)} cannot be a key; expected text"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                if name in seen:
                    message = f"the key {shorten(name)} is repeated; remove one of the entries"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                seen.add(name)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Replaces the merge key ``<<`` of a mapping node by the keys of the mappings after it, each key once.

        PyYAML's own method repeats keys, so that nested merges grow exponentially.
        """
        own_pairs = [(key, value) for key, value in node.value if key.tag != MERGE]
        merges = [value for key, value in node.value if key.tag == MERGE]
        if not merges:
            return
        node.value = own_pairs
        merged = [part for value in merges for part in (value.value if value.id == "sequence" else [value])]
        pairs: dict[Any, Any] = {}
        for part in reversed(merged):  # the first mapping of a list takes precedence
            if part.id != "mapping":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    "expected a mapping, or a list of mappings, after '<<', such as *defaults",
                    part.start_mark,
                )
            self.flatten_mapping(part)
            self._merged += len(part.value)
            if self._merged > MAX_VALUES:
                message = f"expected at most {MAX_VALUES} keys merged with '<<', got more; merge fewer mappings"
                raise yaml.constructor.ConstructorError(None, None, message, part.start_mark)
            pairs |= {key.value if key.id == "scalar" else id(key): (key, value) for key, value in part.value}
        pairs |= {key.value if key.id == "scalar" else id(key): (key, value) for key, value in own_pairs}
        node.value = list(pairs.values())


_Loader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def read_mapping(path: Path) -> dict[str, Any]:
    """Returns the config of a run in a file or checkpoint as a mapping, without validating its keys.

    Args:
        path: a ``.yaml``, ``.yml`` or ``.json`` file, or a checkpoint: a ``.safetensors`` file, its folder, or a run's
            folder (the newest checkpoint).

    Raises:
        ConfigError: if the file cannot be parsed, contains no mapping, or repeats a key.
        FileNotFoundError: if the file does not exist.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        path = checkpoint_file(path)
        text = read_metadata(path).get("config")
        if text is None:
            raise ConfigError([("", f"{path} contains no config; expected a checkpoint written by longalign")])
        return _check_mapping(_load_json_file(text, path), path)
    if not path.exists():
        raise FileNotFoundError(_missing_config_message(path))
    if path.suffix not in CONFIG_SUFFIXES:
        raise ConfigError(
            [("", f"{path} is neither a {', '.join(CONFIG_SUFFIXES)} file nor a checkpoint; expected one of them")]
        )
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ConfigError([("", f"{path} is not UTF-8 text: {error}; save the file as UTF-8")]) from error
    if len(text) > MAX_CHARACTERS:
        message = f"{path} has more than {MAX_CHARACTERS} characters; move long lists of prompts to their own file"
        raise ConfigError([("", message)])
    return _check_mapping(_load_json_file(text, path) if path.suffix == ".json" else _load_yaml_file(text, path), path)


def _missing_config_message(path: Path) -> str:
    """Returns the message for a missing config file. It suggests a bundled example or a similar file name."""
    names = [p.name for p in path.parent.glob("*") if p.suffix in CONFIG_SUFFIXES] if path.parent.is_dir() else []
    bundled = examples_folder() / path.name
    hint = f"; bundled: longalign examples {path.name} --to ." if bundled.is_file() else ""
    return f"no config file {path}{hint or suggestion(path.name, names)}"


def parse_value(text: str) -> Any:
    """Parses a command-line value as YAML: a number, boolean, null, quoted text, list ``[..]`` or mapping ``{..}``.

    Any other text, such as a date or invalid YAML, is returned unchanged.
    """
    try:
        value = _load_yaml(text)
    except (yaml.YAMLError, ValueError):
        value = text
    if text[:1] in "[{\"'" and value != text:
        return value
    return text if isinstance(value, (str, dict, list)) else value


def parse_source(text: str) -> Any:
    """Parses a command-line value that can also be the path of a config file or checkpoint.

    If the text ends in one of `SOURCE_SUFFIXES`, the config in that file is returned as a mapping. Any other text is
    parsed as by `parse_value`, except that an invalid mapping ``{..}`` is an error.

    Raises:
        ConfigError: if the file or a mapping ``{..}`` cannot be parsed.
        FileNotFoundError: if the file does not exist.
    """
    if text.lstrip().startswith("{"):
        return _load_yaml_file(text, shorten(text))
    return read_mapping(Path(text)) if Path(text).suffix in SOURCE_SUFFIXES else parse_value(text)


def _load_yaml(text: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(
            f"the value is nested too deeply, expected at most {MAX_DEPTH} levels of lists and mappings; flatten it"
        ) from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ValueError(_number_problem(error)) from None
    check_size(value)
    return value


def _number_problem(error: ValueError) -> str:
    """Returns the message of a parsing error. Python's message for a number with too many digits is replaced."""
    return "a number has too many digits; shorten it" if "set_int_max_str_digits" in str(error) else str(error)


def _load_yaml_file(text: str, path: Path | str) -> Any:
    try:
        return _load_yaml(text)
    except ConfigError as error:
        raise ConfigError([("", f"{path}: {message}") for _, message in error.errors]) from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError([("", f"{where}: {getattr(error, 'problem', None) or error}")]) from error


def _load_json_file(text: str, path: Path) -> Any:
    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in pairs:
            if name in out:
                raise ValueError(f"the key {shorten(name)} is repeated; remove one of the entries")
            out[name] = value
        return out

    try:
        return json.loads(text, object_pairs_hook=reject_duplicates)
    except RecursionError:
        raise ConfigError(
            [("", f"{path} is nested too deeply; expected at most {MAX_DEPTH} levels of lists and mappings")]
        ) from None
    except ValueError as error:
        raise ConfigError([("", f"{path}: {_number_problem(error)}")]) from error


def _check_mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError([("", f"{path}: expected a mapping of keys to values, got {shorten(value)}")])
    if invalid := [shorten(key) for key in value if not isinstance(key, str)]:
        raise ConfigError([(key, f"{path}: keys must be strings, got {key}; quote it") for key in invalid])
    return value
