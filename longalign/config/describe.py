"""Describes parts (encoders, rewards and so on) and config keys as text for the terminal. Does not import torch."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from longalign.config.run import RunConfig
from longalign.config.schema import REFERENCE, model_schema, run_schema, summary
from longalign.discovery import discover
from longalign.errors import suggestion
from longalign.registry import KIND, REGISTRIES, PartConfig, PartError, Registry, misnamed_entry_points

Schema = dict[str, Any]

MISSING = object()
BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
#: JSON types in the words of config files
TYPES = {
    "boolean": "true | false",
    "integer": "int",
    "number": "float",
    "object": "mapping",
    "string": "text",
}


def parts_table(kinds: Iterable[str] = (), targets: bool = False) -> tuple[str, list[str]]:
    """Returns a table of the available parts (encoders, rewards and so on), and the problems found.

    Imports the config class of each part.

    Args:
        kinds: the kinds to list, e.g. ``["encoders"]``; if empty, all kinds.
        targets: whether to show the module and class of each part's config instead of the part's description.

    Returns:
        ``(table, problems)``. The table is a text with the columns kind, name, owner (the package that provides the
        part), and description or target (``module:class``). The problems are messages, one for each part that cannot be
        imported and each package whose entry points are invalid.

    Raises:
        PartError: if there is no such kind.
    """
    rows: list[tuple[str, ...]] = [("kind", "name", "owner", "target" if targets else "description")]
    problems = [f"the entry points of {dist} cannot be read: {error}" for dist, error in discover().malformed]
    problems += [problem for _, problem in misnamed_entry_points()]
    for registry in _registries(kinds):
        for name in registry.names():
            try:
                description = _short_description(registry.get(name))
            except PartError as error:
                reason = error.__cause__
                description = f"broken: {reason if isinstance(reason, PartError) else error}"
                problems.append(str(error))
            for info in registry.infos(name):
                owner = info.owner if targets else info.owner.rpartition(" ")[0]
                rows.append((info.kind, name, owner, info.target if targets else description))
    return _table(rows, fill=not targets), problems


def describe_kind(kind: str) -> str:
    """Returns a table with the name and description of each part of a kind, e.g. ``"encoders"``.

    For a part whose config class cannot be imported, the description is the error.

    Raises:
        PartError: if there is no such kind.
    """
    (registry,) = _registries([kind])
    rows: list[tuple[str, ...]] = []
    for name in registry.names():
        try:
            rows.append((name, _short_description(registry.get(name))))
        except PartError as error:
            rows.append((name, f"broken: {error}"))
    return _table(rows, fill=True)


def describe(*words: str) -> str:
    """Returns the text that ``longalign describe`` prints about a kind of parts, a part, or keys of a config.

    Args:
        *words: a kind (``"encoders"``), the name of a part (``"t5"``), a kind and the name of a part, ``"run"`` for all
            keys of a run, or a key of a run with keys of its own (``"loop"``). Without words, all parts are listed.

    Raises:
        PartError: if there is no such kind, part or key.
    """
    if not words:
        return parts_table()[0]
    topic, details = words[0], words[1:]
    kind = topic if topic in REGISTRIES else f"{topic}s"
    sections = {key: model for key, field in RunConfig.model_fields.items() for model in _models(field.annotation)}
    part_kinds = [registry.kind for registry in REGISTRIES.values() if topic in registry]
    if kind in REGISTRIES and len(details) < 2:
        return describe_part(kind, details[0]) if details else describe_kind(kind)
    if kind in REGISTRIES or (details and (topic == "run" or topic in sections or part_kinds)):
        raise PartError(
            f"expected one word, or a kind and the name of one part, e.g. encoders t5, got {' '.join(words)}"
        )
    if topic == "run":
        return describe_model(RunConfig)
    if topic in sections:
        return describe_model(sections[topic])
    if part_kinds:
        return "\n\n".join(describe_part(kind, topic) for kind in part_kinds)
    topics = ("run", *sections, *REGISTRIES, *(name for registry in REGISTRIES.values() for name in registry.names()))
    raise PartError(
        f"cannot describe '{topic}'{suggestion(topic, topics) or '.'} Expected a kind ({', '.join(REGISTRIES)}), "
        f"a part, 'run', a key of a run ({', '.join(sections)}), a .yaml or .json config, or a checkpoint."
    )


def describe_schema(words: Sequence[str]) -> str:
    """Returns the JSON schema of a run's config as text, as ``longalign describe run --json-schema`` prints it.

    Args:
        words: the words after ``describe``.

    Raises:
        PartError: if ``words`` is not ``["run"]``.
    """
    if list(words) != ["run"]:
        raise PartError(f"--json-schema describes a run; expected: longalign describe run, got {' '.join(words)}")
    return json.dumps(run_schema(), indent=2, ensure_ascii=False)


def describe_part(kind: str, name: str) -> str:
    """Returns a text about one part: package, docstring, and the type, default and description of each config key.

    Args:
        kind: plural name of the kind, e.g. ``"encoders"``.
        name: name of the part, e.g. ``"t5"``.

    Raises:
        PartError: if there is no such kind or part, or the part's config class cannot be imported.
    """
    (registry,) = _registries([kind])
    model, info = registry.get(name), registry.info(name)
    head = f"{name} ({kind}), from {info.owner}: {info.target}\n\n{summary(model)}\n"
    return "\n".join([head, *_describe_keys(model)]).rstrip()


def describe_model(model: type[BaseModel]) -> str:
    """Returns a text about a config class such as `longalign.config.run.RunConfig`: its docstring and its keys."""
    return "\n".join([f"{summary(model)}\n", *_describe_keys(model)]).rstrip()


def _registries(kinds: Iterable[str]) -> list[Registry]:
    kinds = list(kinds)
    for kind in kinds:
        if kind not in REGISTRIES:
            hint = suggestion(kind, REGISTRIES) or "."
            raise PartError(f"no kind '{kind}'{hint} Available: {', '.join(REGISTRIES)}.")
    return [REGISTRIES[kind] for kind in kinds or REGISTRIES]


def _terminal_width() -> int:
    """Returns the width of the terminal in characters, clamped to 40 to 120; 100 without a terminal."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120)


def _short_description(model: type) -> str:
    return " ".join(summary(model).split("\n\n")[0].split())


def _table(rows: list[tuple[str, ...]], fill: bool = False) -> str:
    """Returns rows as lines of aligned columns; with ``fill``, the last column is shortened to the terminal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    if fill:
        head, width = sum(widths) + 2 * len(widths), _terminal_width()
        lines = [
            line[:head] + textwrap.shorten(line[head:], max(width - head, 18), placeholder="...") for line in lines
        ]
    return "\n".join(lines)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Returns the config classes in the type annotation of a key, except those of parts."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) and annotation is not PartConfig else []
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _describe_keys(model: type[BaseModel]) -> Iterator[str]:
    schema = model_schema(model)
    yield from _describe_properties(schema, schema["$defs"])


def _describe_properties(schema: Schema, definitions: Schema, prefix: str = "", values: Any = None) -> Iterator[str]:
    """Yields the lines that describe each key of a JSON schema, and the keys nested in it.

    Args:
        schema: schema with ``properties``.
        definitions: schemas that ``schema`` refers to, by name.
        prefix: text before each key, e.g. ``"loop."``.
        values: mapping of keys to defaults, which replace those of the schema; None for none.
    """
    # required keys come first, even after the inherited keys of a base class
    for key, value in sorted(schema["properties"].items(), key=lambda item: item[0] not in schema.get("required", ())):
        default = values[key] if isinstance(values, dict) and key in values else value.get("default", MISSING)
        sections = list(_sections(value, definitions))
        state = " (required)" if default is MISSING and key in schema.get("required", ()) else ""
        if default is not MISSING and not (sections and isinstance(default, dict)):
            state = f" = {json.dumps(default, ensure_ascii=False)}"
        yield f"{prefix}{key}: {type_text(value)}{state}"
        if text := value.get("description"):
            yield textwrap.fill(
                text, _terminal_width(), initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
        for section, is_list in sections:
            yield from _describe_properties(section, definitions, f"{prefix}{key}.{'0.' if is_list else ''}", default)


def _sections(value: Schema, definitions: Schema, is_list: bool = False) -> Iterator[tuple[Schema, bool]]:
    """Yields ``(schema, whether in a list)`` for each mapping with fixed keys that a value can be or contain.

    Parts are omitted, because they are described separately, by name.
    """
    if "$ref" in value:
        yield definitions[value["$ref"].removeprefix(REFERENCE)], is_list
    for member in value.get("anyOf", ()):
        yield from _sections(member, definitions, is_list)
    if isinstance(value.get("items"), dict):
        yield from _sections(value["items"], definitions, True)


def type_text(value: Schema) -> str:
    """Returns the type in a JSON schema as text, such as ``"all" | "first"``, ``int >= 1`` or ``list of text``."""
    bounds = [f"{sign} {value[key]}" for key, sign in BOUNDS if key in value]
    return " ".join([_plain_type(value), *([" and ".join(bounds)] if bounds else [])])


def _plain_type(value: Schema) -> str:
    if KIND in value:
        return f"one of {value[KIND]}"
    if "anyOf" in value:
        return " | ".join(map(type_text, value["anyOf"]))
    if "enum" in value or "const" in value:
        return " | ".join(map(json.dumps, value.get("enum", [value.get("const")])))
    kind = value.get("type", "mapping" if "$ref" in value else "any")
    if kind == "array" and "prefixItems" in value:
        return f"[{', '.join(map(type_text, value['prefixItems']))}]"
    if kind == "array":
        return f"list of {type_text(value.get('items', {}))}"
    if kind == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"mapping of text to {type_text(value['additionalProperties'])}"
    return TYPES.get(kind, kind)
