"""Mappings from files: YAML, JSON and the metadata of checkpoints. Importing this module does not import torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from longalign.errors import LARGEST, ConfigError, check_size, shorten, suggestion
from longalign.runtime import examples_folder

CHECKPOINT = "longalign.safetensors"
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
#: model card of an exported checkpoint
CARD = "README.md"
#: folder of the reward in a checkpoint of a run that trained one
REWARD = "reward"
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BOOL, INT, FLOAT, TIME, VALUE, MERGE = (
    f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "value", "merge")
)
#: most characters of a config file
LONGEST = 2**20


def place(subfolder: str | None, folder: str) -> str:
    """Where in a checkpoint a folder of diffusers' layout is, if all of them are in ``subfolder``."""
    return f"{subfolder}/{folder}" if subfolder else folder


def check_single_file(checkpoint: str, layout: str | None, **choosing: str | None) -> None:
    """Checks the keys that go with a checkpoint, which is one ``.safetensors`` file by its name, or a folder or
    repository.

    Args:
        checkpoint: what it is.
        layout: describes a file.
        **choosing: keys that choose among the files of a folder or repository.

    Raises:
        ValueError: if it is a pickle, or a key that is given does not go with it.
    """
    if checkpoint.endswith(".ckpt"):
        raise ValueError("a .ckpt file is a pickle, which can run code and is not read; convert it to .safetensors")
    single = checkpoint.endswith(".safetensors")
    if layout is not None and not single:
        raise ValueError("'layout' describes a single .safetensors file; a folder or repository has its own")
    if single and (given := [f"'{key}'" for key, value in choosing.items() if value is not None]):
        raise ValueError(
            f"'checkpoint' is one file, and {' and '.join(given)} would choose among the files of a folder or "
            "repository; leave out"
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``no`` is a word, ``1e-4`` a number, ``1:30`` is none. Repeated keys and tags are errors."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag not in (BOOL, INT, FLOAT, TIME, VALUE)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _merged = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the tag '{event.tag}' is not read; write the value without it", event.start_mark
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
        """Puts what ``<<`` names before a mapping's own keys, each key once: merged mappings that are merged again
        would double."""
        own = [(key, value) for key, value in node.value if key.tag != MERGE]
        merges = [value for key, value in node.value if key.tag == MERGE]
        if not merges:
            return
        node.value = own
        parts = [part for value in merges for part in (value.value if value.id == "sequence" else [value])]
        pairs: dict[Any, Any] = {}
        for part in reversed(parts):  # of a list the first wins
            if part.id != "mapping":
                raise yaml.constructor.ConstructorError(None, None, "'<<' takes mappings", part.start_mark)
            self.flatten_mapping(part)
            self._merged += len(part.value)
            if self._merged > LARGEST:
                raise yaml.constructor.ConstructorError(None, None, "too much is merged", part.start_mark)
            pairs |= {key.value if key.id == "scalar" else id(key): (key, value) for key, value in part.value}
        pairs |= {key.value if key.id == "scalar" else id(key): (key, value) for key, value in own}
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
    """Reads a mapping from a ``.yaml``, ``.yml`` or ``.json`` file, or the config that a checkpoint carries.

    Raises:
        ConfigError: if the file is not readable as such, is not a mapping, or repeats a key.
        FileNotFoundError: if there is no such file.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        path = checkpoint_file(path)
        text = read_metadata(path).get("config")
        if text is None:
            raise ConfigError([("", f"{path} carries no config; expected a checkpoint written by longalign")])
        return _mapping(_json(text, path), path)
    if not path.exists():
        raise FileNotFoundError(_no_config(path))
    if path.suffix not in CONFIG_SUFFIXES:
        raise ConfigError([("", f"{path} is neither {', '.join(CONFIG_SUFFIXES)} nor a checkpoint")])
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except UnicodeDecodeError as error:
        raise ConfigError([("", f"{path} is not UTF-8 text: {error}")]) from error
    if len(text) > LONGEST:
        raise ConfigError(
            [("", f"{path} is no config: it has more than {LONGEST} characters; long lists of prompts go into a file")]
        )
    return _mapping(_json(text, path) if path.suffix == ".json" else _yaml(text, path), path)


def _no_config(path: Path) -> str:
    """That a file is missing, with those of similar names beside it."""
    there = [p.name for p in path.parent.glob("*") if p.suffix in CONFIG_SUFFIXES] if path.parent.is_dir() else []
    bundled = examples_folder() / path.name
    hint = f"; bundled: longalign examples {path.name} --to ." if bundled.is_file() else ""
    return f"no config file {path}{hint or suggestion(path.name, there)}"


def check_folder(folder: Path) -> None:
    """Raises ValueError if a file stands where a folder is to be, or where one above it is."""
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"{path} is a file; expected a folder")
            return


def check_unexported(folder: Path) -> None:
    """Raises ValueError if a folder has the files that an exported checkpoint consists of, or is a file."""
    check_folder(folder)
    for name in (CHECKPOINT, CARD):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} exists; choose another folder, or set overwrite (--overwrite)")


def checkpoint_file(path: Path) -> Path:
    """The ``longalign.safetensors`` of a checkpoint given as its file, its folder, or a run's folder (the newest one).

    Raises:
        FileNotFoundError: if there is none.
    """
    if path.is_file() or (path.suffix == ".safetensors" and not path.is_dir()):
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint {path}")
        if path.name == DIFFUSERS_LORA:
            raise ValueError(
                f"{path} is an exported LoRA for plain diffusers, without config and adapter; expected "
                f"{path.parent}, or {path.with_name(CHECKPOINT)}"
            )
        return path
    if (path / CHECKPOINT).is_file():
        return path / CHECKPOINT
    inside = [p for p in path.glob(f"checkpoint-*/{CHECKPOINT}") if p.parent.name.rpartition("-")[2].isdigit()]
    if not inside:
        raise FileNotFoundError(
            f"no checkpoint in {path}; expected {CHECKPOINT} or checkpoint-<step>/{CHECKPOINT} there"
        )
    return max(inside, key=lambda p: int(p.parent.name.rpartition("-")[2]))


def find_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """As `checkpoint_file`, or the file of a repository ``owner/name`` of the hub, where there is no folder ``owner``.

    Raises:
        FileNotFoundError: if there is neither.
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
        why = hub.why(error, CHECKPOINT)
        raise FileNotFoundError(f"no checkpoint '{checkpoint}' in this folder or on the hub: {why}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of header length, the header in JSON, its ``__metadata__``.

    Raises:
        ConfigError: if it has none that is whole, or some that is not text.
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
        raise ConfigError([("", f"{path} is damaged: expected texts by name as metadata, got {shorten(metadata)}")])
    return metadata


def parse_value(text: str) -> Any:
    """A value written on the command line: a YAML scalar, list ``[..]`` or mapping ``{..}``; other text is itself."""
    try:
        value = _load_yaml(text)
    except (yaml.YAMLError, ValueError):
        value = text
    if text[:1] in "[{\"'" and value != text:
        return value
    return text if isinstance(value, (str, dict, list)) else value


def parse_assignments(items: Sequence[str]) -> dict[str, Any]:
    """``["encoder=t5", "loop.lr=1e-4"]`` as the changes that `longalign.config.override` takes.

    Raises:
        ConfigError: all items that are not ``path=value``, or repeat a path.
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
        raise ValueError(_no_number(error)) from None
    check_size(value)
    return value


def _no_number(error: ValueError) -> str:
    """What is wrong with a text that reads like a number; of too long ones Python speaks of a setting of its own."""
    return "a number has too many digits" if "set_int_max_str_digits" in str(error) else str(error)


def _yaml(text: str, path: Path) -> Any:
    try:
        return _load_yaml(text)
    except ConfigError as error:
        raise ConfigError([("", f"{path}: {message}") for _, message in error.errors]) from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError([("", f"{where}: {getattr(error, 'problem', None) or error}")]) from error


def _json(text: str, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in pairs:
            if name in out:
                raise ValueError(f"the key {shorten(name)} is repeated")
            out[name] = value
        return out

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ConfigError([("", f"{path}: it is nested too deeply")]) from None
    except ValueError as error:
        raise ConfigError([("", f"{path}: {_no_number(error)}")]) from error


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError([("", f"{path}: expected a mapping of keys to values, got {shorten(value)}")])
    if odd := [k for k in value if not isinstance(k, str)]:
        raise ConfigError([(shorten(k), f"{path}: a key must be a word, got {shorten(k)}") for k in odd])
    return value
