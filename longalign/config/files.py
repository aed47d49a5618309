"""Config files in YAML and JSON, and checkpoint files with their metadata. Importing it does not import torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from longalign.errors import MAX_VALUES, ConfigError, check_size, shorten, suggestion
from longalign.runtime import examples_folder

CHECKPOINT = "longalign.safetensors"
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
#: model card of an exported checkpoint
CARD = "README.md"
#: folder of a trained reward inside a checkpoint
REWARD = "reward"
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BOOL, INT, FLOAT, TIME, VALUE, MERGE = (
    f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "value", "merge")
)
#: maximum number of characters in a config file
MAX_CHARACTERS = 2**20


def join_subfolder(subfolder: str | None, folder: str) -> str:
    """Path of a component folder in a checkpoint whose components are all inside ``subfolder``."""
    return f"{subfolder}/{folder}" if subfolder else folder


def check_single_file(checkpoint: str, layout: str | None, **selection: str | None) -> None:
    """Checks that config keys match the type of a checkpoint: a ``.safetensors`` file, or a folder or repository.

    Args:
        checkpoint: file, folder or repository.
        layout: layout of a single file.
        **selection: keys that select files of a folder or repository.

    Raises:
        ValueError: if the checkpoint is a pickle, or a key does not apply to it.
    """
    if checkpoint.endswith(".ckpt"):
        raise ValueError("a .ckpt file is a pickle, which can run code and is not read; convert it to .safetensors")
    is_file = checkpoint.endswith(".safetensors")
    if layout is not None and not is_file:
        raise ValueError("'layout' describes a single .safetensors file; remove it for a folder or repository")
    if is_file and (keys := [f"'{key}'" for key, value in selection.items() if value is not None]):
        raise ValueError(
            f"'checkpoint' is a single file, and {' and '.join(keys)} only apply to a folder or Hub repository; "
            "remove them"
        )


class _Loader(yaml.SafeLoader):
    """Loader with the scalars of YAML 1.2: ``no`` and ``1:30`` are strings, ``1e-4`` is a number.

    Repeated keys and tags are errors.
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
                    message = f"{shorten(name)} cannot be a key"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                if name in seen:
                    message = f"the key {shorten(name)} is repeated"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                seen.add(name)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Merges the mappings of ``<<`` into a mapping, with each key once.

        PyYAML repeats keys, so that chains of merges grow exponentially.
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
                raise yaml.constructor.ConstructorError(None, None, "'<<' takes mappings", part.start_mark)
            self.flatten_mapping(part)
            self._merged += len(part.value)
            if self._merged > MAX_VALUES:
                message = f"expected at most {MAX_VALUES} merged keys"
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
    """Reads a mapping from a ``.yaml``, ``.yml`` or ``.json`` file, or from the metadata of a checkpoint.

    Raises:
        ConfigError: if the file is invalid, is not a mapping, or repeats a key.
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
        raise ConfigError([("", f"{path} is neither {', '.join(CONFIG_SUFFIXES)} nor a checkpoint")])
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ConfigError([("", f"{path} is not UTF-8 text: {error}")]) from error
    if len(text) > MAX_CHARACTERS:
        message = f"{path} has more than {MAX_CHARACTERS} characters; move long lists of prompts to their own file"
        raise ConfigError([("", message)])
    return _check_mapping(_load_json_file(text, path) if path.suffix == ".json" else _load_yaml_file(text, path), path)


def _missing_config_message(path: Path) -> str:
    """Message for a missing file, with a bundled example or a file of a similar name."""
    names = [p.name for p in path.parent.glob("*") if p.suffix in CONFIG_SUFFIXES] if path.parent.is_dir() else []
    bundled = examples_folder() / path.name
    hint = f"; bundled: longalign examples {path.name} --to ." if bundled.is_file() else ""
    return f"no config file {path}{hint or suggestion(path.name, names)}"


def check_folder(folder: Path) -> None:
    """Raises ValueError if the path of a folder, or one of its parents, is a file."""
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"{path} is a file; expected a folder")
            return


def check_unexported(folder: Path) -> None:
    """Raises ValueError if a folder contains an exported checkpoint, or is a file."""
    check_folder(folder)
    for name in (CHECKPOINT, CARD):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} exists; choose another folder, or set overwrite (--overwrite)")


def checkpoint_file(path: Path) -> Path:
    """Returns the ``longalign.safetensors`` of a checkpoint file, a checkpoint folder, or a run's newest checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the file is an exported LoRA for diffusers.
    """
    if path.is_file() or (path.suffix == ".safetensors" and not path.is_dir()):
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint {path}")
        if path.name == DIFFUSERS_LORA:
            raise ValueError(
                f"{path} is an exported LoRA for diffusers, without config and adapter; expected "
                f"{path.parent}, or {path.with_name(CHECKPOINT)}"
            )
        return path
    if (path / CHECKPOINT).is_file():
        return path / CHECKPOINT
    checkpoints = [p for p in path.glob(f"checkpoint-*/{CHECKPOINT}") if p.parent.name.rpartition("-")[2].isdigit()]
    if not checkpoints:
        raise FileNotFoundError(f"no checkpoint in {path}; expected {CHECKPOINT} or checkpoint-<step>/{CHECKPOINT}")
    return max(checkpoints, key=lambda p: int(p.parent.name.rpartition("-")[2]))


def find_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """Returns a local checkpoint as `checkpoint_file` does, or downloads it from the Hub repository ``owner/name``.

    The Hub is only used if there is no local folder ``owner``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
    """
    from longalign import hub

    path = Path(checkpoint)
    if hub.is_base_model(checkpoint):
        raise FileNotFoundError(hub.BASE_MODEL.format(f"'{checkpoint}'"))
    if not HUB_ID.fullmatch(checkpoint) or Path(path.parts[0]).exists():
        return checkpoint_file(path)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint, CHECKPOINT, revision=revision))
    except Exception as error:
        reason = hub.download_problem(error, CHECKPOINT)
        raise FileNotFoundError(f"no checkpoint '{checkpoint}' in this folder or on the Hub: {reason}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file without its tensors.

    The file starts with the header length in 8 bytes and a JSON header with ``__metadata__``.

    Raises:
        ConfigError: if the header is invalid or truncated, or a value is not a string.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
    except (struct.error, ValueError, RecursionError) as error:
        raise ConfigError([("", f"{path} is not a safetensors file, or is truncated: {error}")]) from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else header
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConfigError([("", f"{path} is damaged: expected strings as metadata, got {shorten(metadata)}")])
    return metadata


def parse_value(text: str) -> Any:
    """Parses a command-line value: a YAML scalar, list ``[..]`` or mapping ``{..}``; other text stays a string."""
    try:
        value = _load_yaml(text)
    except (yaml.YAMLError, ValueError):
        value = text
    if text[:1] in "[{\"'" and value != text:
        return value
    return text if isinstance(value, (str, dict, list)) else value


def parse_assignments(items: Sequence[str]) -> dict[str, Any]:
    """Parses ``["encoder=t5", "loop.lr=1e-4"]`` into changes for `longalign.config.run.override`.

    Raises:
        ConfigError: if items are not ``path=value``, or repeat a path; lists all of them.
    """
    out: dict[str, Any] = {}
    problems = []
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path:
            problems.append((item, "expected path=value, e.g. loop.lr=1e-4"))
        elif path in out:
            problems.append((path, "this path is given twice"))
        else:
            out[path] = parse_value(text)
    if problems:
        raise ConfigError(problems)
    return out


def _load_yaml(text: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ValueError(_number_problem(error)) from None
    check_size(value)
    return value


def _number_problem(error: ValueError) -> str:
    """Message for an invalid number. Python's message for too many digits only names an interpreter setting."""
    return "a number has too many digits" if "set_int_max_str_digits" in str(error) else str(error)


def _load_yaml_file(text: str, path: Path) -> Any:
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
                raise ValueError(f"the key {shorten(name)} is repeated")
            out[name] = value
        return out

    try:
        return json.loads(text, object_pairs_hook=reject_duplicates)
    except RecursionError:
        raise ConfigError([("", f"{path}: it is nested too deeply")]) from None
    except ValueError as error:
        raise ConfigError([("", f"{path}: {_number_problem(error)}")]) from error


def _check_mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError([("", f"{path}: expected a mapping of keys to values, got {shorten(value)}")])
    if invalid := [key for key in value if not isinstance(key, str)]:
        raise ConfigError([(shorten(key), f"{path}: keys must be strings, got {shorten(key)}") for key in invalid])
    return value
