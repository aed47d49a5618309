"""Descriptions of parts and their keys, for the terminal. Imports configs, but not torch."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longalign.config.run import RunConfig
from longalign.discovery import discover
from longalign.errors import suggestion
from longalign.registry import REGISTRIES, PartConfig, PartError, PartOf, Registry, misnamed_entry_points

LOWER_BOUNDS = ((annotated_types.Ge, "ge", ">="), (annotated_types.Gt, "gt", ">"))
UPPER_BOUNDS = ((annotated_types.Le, "le", "<="), (annotated_types.Lt, "lt", "<"))


def parts_table(kinds: Iterable[str] = (), targets: bool = False) -> tuple[str, list[str]]:
    """Table of the available parts, and a list of problems. Imports the config of each part.

    Args:
        kinds: the kinds to list; all if empty.
        targets: show the module and class of each part's config instead of its description.

    Returns:
        The table, with kind, name, owner and description or target; and one message per problem.
    """
    rows: list[tuple[str, ...]] = [("kind", "name", "owner", "target" if targets else "description")]
    problems = [f"the entry points of {dist} cannot be read: {error}" for dist, error in discover().malformed]
    problems += [problem for _, problem in misnamed_entry_points()]
    for registry in _registries(kinds):
        for name in registry.names():
            try:
                description = _short_description(registry.get(name))
            except PartError as error:
                description = "broken"
                problems.append(str(error))
            for info in registry.infos(name):
                owner = info.owner if targets else info.owner.rpartition(" ")[0]
                rows.append((info.kind, name, owner, info.target if targets else description))
    return _table(rows, fill=not targets), problems


def describe_kind(kind: str) -> str:
    """Table of the parts of a kind with their short descriptions, or the error of a broken part."""
    (registry,) = _registries([kind])
    rows: list[tuple[str, ...]] = []
    for name in registry.names():
        try:
            rows.append((name, _short_description(registry.get(name))))
        except PartError as error:
            rows.append((name, f"broken: {error}"))
    return _table(rows, fill=True)


def describe_topic(words: Sequence[str]) -> str:
    """Output of ``longalign describe`` for a kind, a kind and a part, a part, ``run`` or a key of a run.

    Raises:
        PartError: if there is no such kind, part or key.
    """
    topic, details = words[0], words[1:]
    kind = topic if topic in REGISTRIES else f"{topic}s"
    sections = {key: model for key, field in RunConfig.model_fields.items() for model in _sections(field.annotation)}
    part_kinds = [registry.kind for registry in REGISTRIES.values() if topic in registry]
    if kind in REGISTRIES and len(details) < 2:
        return describe_part(kind, details[0]) if details else describe_kind(kind)
    if kind in REGISTRIES or (details and (topic == "run" or topic in sections or part_kinds)):
        raise PartError(f"expected a kind and one part's name, or one word, got {' '.join(words)}")
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


def describe_part(kind: str, name: str) -> str:
    """Description of one part: its docstring, origin, and each key with type, default and description."""
    (registry,) = _registries([kind])
    model, info = registry.get(name), registry.info(name)
    head = f"{name} ({kind}), from {info.owner}: {info.target}\n\n{_parse_docstring(model)[0]}\n"
    return "\n".join([head, *_describe_keys(model)]).rstrip()


def describe_model(model: type[BaseModel]) -> str:
    """Description of a config class that is not a part, such as `longalign.config.run.RunConfig`."""
    return "\n".join([f"{_parse_docstring(model)[0]}\n", *_describe_keys(model)]).rstrip()


def _registries(kinds: Iterable[str]) -> list[Registry]:
    kinds = list(kinds)
    for kind in kinds:
        if kind not in REGISTRIES:
            hint = suggestion(kind, REGISTRIES) or "."
            raise PartError(f"no kind '{kind}'{hint} Available: {', '.join(REGISTRIES)}.")
    return [REGISTRIES[kind] for kind in kinds or REGISTRIES]


def _terminal_width() -> int:
    """Columns of the terminal, limited to 40 to 120 for legibility; 100 without a terminal."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120)


def _short_description(model: type) -> str:
    return " ".join(_parse_docstring(model)[0].split("\n\n")[0].split())


def _table(rows: list[tuple[str, ...]], fill: bool = False) -> str:
    """Aligns rows in columns; ``fill`` shortens the last column to the terminal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    if fill:
        head, width = sum(widths) + 2 * len(widths), _terminal_width()
        lines = [
            line[:head] + textwrap.shorten(line[head:], max(width - head, 18), placeholder="...") for line in lines
        ]
    return "\n".join(lines)


def _describe_keys(model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[str]:
    descriptions = {}
    for base in reversed(model.__mro__):
        descriptions.update(_parse_docstring(base)[1] if issubclass(base, BaseModel) else {})
    # required keys come first, even after the inherited keys of a base class
    for key, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        if key == "name" and issubclass(model, PartConfig):
            continue
        annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        default = _default_of(field) if defaults is None else getattr(defaults, key)
        yield f"{prefix}{key}: {type_text(annotation)}{_default(field, default)}"
        if text := descriptions.get(key):
            yield textwrap.fill(
                text, _terminal_width(), initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
        for section in _sections(field.annotation):
            is_list = get_origin(field.annotation) in (list, tuple)
            section_defaults = default if isinstance(default, section) else None
            yield from _describe_keys(section, f"{prefix}{key}.{'0.' if is_list else ''}", section_defaults)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        # parts looked up by name have descriptions of their own
        return [annotation] if issubclass(annotation, BaseModel) and annotation is not PartConfig else []
    return [section for a in get_args(annotation) for section in _sections(a)]


def _default_of(field: FieldInfo) -> Any:
    return PydanticUndefined if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _default(field: FieldInfo, value: Any) -> str:
    if value is PydanticUndefined and field.is_required():
        return " (required)"
    if isinstance(value, BaseModel):
        return "" if _sections(field.annotation) else f" = {json.dumps(value.model_dump(mode='json'))}"
    return "" if value is PydanticUndefined else f" = {json.dumps(value, default=str, ensure_ascii=False)}"


def type_text(annotation: Any) -> str:
    """Formats an annotation in config-file terms: ``"plain" | "referring"``, ``int >= 1``, ``list of text``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [m for arg in args[1:] for m in (arg.metadata if isinstance(arg, FieldInfo) else (arg,))]
        kind = next((m.kind for m in metadata if isinstance(m, PartOf)), None)
        return (f"one of {kind}" if kind else type_text(args[0])) + _bounds(metadata)
    if origin is Literal:
        return " | ".join(json.dumps(a) for a in args)
    if origin in (tuple, list) and (origin is list or args[-1] is Ellipsis):
        return f"list of {type_text(args[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_text, args))}]"
    if origin is dict:
        return f"mapping of {type_text(args[0])} to {type_text(args[1])}"
    if args:
        return " | ".join(map(type_text, args))
    if isinstance(annotation, type):
        names = {str: "text", type(None): "null", bool: "true | false"}
        return names.get(annotation, "mapping" if issubclass(annotation, (BaseModel, dict)) else annotation.__name__)
    return re.sub(r"\w+\.", "", str(annotation))


def _bounds(metadata: Iterable[Any]) -> str:
    metadata = list(metadata)
    bounds = [
        f"{sign} {getattr(item, attribute)}"
        for kind, attribute, sign in (*LOWER_BOUNDS, *UPPER_BOUNDS)
        for item in metadata
        if isinstance(item, kind) and isinstance(getattr(item, attribute), (int, float))
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _parse_docstring(model: type) -> tuple[str, dict[str, str]]:
    """Text of a docstring before ``Attributes:``, and the description of each attribute."""
    doc = inspect.cleandoc(model.__doc__ or "") if "__doc__" in vars(model) else ""
    text, _, rest = doc.partition("Attributes:")
    descriptions: dict[str, str] = {}
    key = ""
    for line in rest.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            key = match[1]
            descriptions[key] = match[2]
        elif line.startswith("        ") and key:
            descriptions[key] += " " + line.strip()
        elif line.strip() and not line.startswith(" "):
            break
    return text.replace("``", "`").strip(), {key: value.replace("``", "`") for key, value in descriptions.items()}
