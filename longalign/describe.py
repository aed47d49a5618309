"""Parts and their keys as text for a terminal; imports configs, and no torch."""

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

from longalign.config import RunConfig
from longalign.discovery import discover
from longalign.errors import suggestion
from longalign.registry import REGISTRIES, PartConfig, PartError, PartOf, Registry, misnamed

BOUNDS = ((annotated_types.Ge, "ge", ">="), (annotated_types.Gt, "gt", ">"))
CEILINGS = ((annotated_types.Le, "le", "<="), (annotated_types.Lt, "lt", "<"))


def list_parts(kinds: Iterable[str] = (), targets: bool = False) -> tuple[str, list[str]]:
    """A table of the parts, and what is wrong with them. Each part's config is loaded.

    Args:
        kinds: the kinds to list; all if empty.
        targets: whether to show where each part's config is, instead of the beginning of its description.

    Returns:
        The table, with kind, name, owner and description or target; and one message for each fault.
    """
    rows: list[tuple[str, ...]] = [("kind", "name", "owner", "target" if targets else "description")]
    problems = [f"the entry points of {who} cannot be read: {why}" for who, why in discover().malformed]
    problems += [problem for _, problem in misnamed()]
    for registry in _kinds(kinds):
        for name in registry.names():
            try:
                about = _beginning(registry.get(name))
            except PartError as error:
                about = "broken"
                problems.append(str(error))
            for info in registry.infos(name):
                who = info.owner if targets else info.owner.rpartition(" ")[0]
                rows.append((info.kind, name, who, info.target if targets else about))
    return _table(rows, fill=not targets), problems


def describe_kind(kind: str) -> str:
    """The parts of a kind, each with the first sentence of its description; a broken one with its error."""
    (registry,) = _kinds([kind])
    rows: list[tuple[str, ...]] = []
    for name in registry.names():
        try:
            rows.append((name, _beginning(registry.get(name))))
        except PartError as error:
            rows.append((name, f"broken: {error}"))
    return _table(rows, fill=True)


def explain(words: Sequence[str]) -> str:
    """What ``longalign describe`` prints of words: a kind or a key of a config, a part, or both.

    Raises:
        PartError: if there is nothing of that name.
    """
    what, more = words[0], words[1:]
    kind = what if what in REGISTRIES else f"{what}s"
    sections = {key: model for key, field in RunConfig.model_fields.items() for model in _sections(field.annotation)}
    owners = [registry.kind for registry in REGISTRIES.values() if what in registry]
    if kind in REGISTRIES and len(more) < 2:
        return describe_part(kind, more[0]) if more else describe_kind(kind)
    if kind in REGISTRIES or (more and (what == "run" or what in sections or owners)):
        raise PartError(f"expected a kind and one part's name, or one word, got {' '.join(words)}")
    if what == "run":
        return describe_model(RunConfig)
    if what in sections:
        return describe_model(sections[what])
    if owners:
        return "\n\n".join(describe_part(kind, what) for kind in owners)
    known = ("run", *sections, *REGISTRIES, *(name for registry in REGISTRIES.values() for name in registry.names()))
    raise PartError(
        f"cannot describe '{what}'{suggestion(what, known) or '.'} It can be a kind ({', '.join(REGISTRIES)}), a part, "
        f"'run', a key of it ({', '.join(sections)}), a .yaml or .json config, or a checkpoint."
    )


def describe_part(kind: str, name: str) -> str:
    """One part: what it is, where it comes from, and each key with type, default and description."""
    (registry,) = _kinds([kind])
    model, info = registry.get(name), registry.info(name)
    head = f"{name} ({kind}), from {info.owner}: {info.target}\n\n{_summary(model)[0]}\n"
    return "\n".join([head, *_keys(model)]).rstrip()


def describe_model(model: type[BaseModel]) -> str:
    """A config class that is no part, such as `longalign.config.RunConfig`."""
    return "\n".join([f"{_summary(model)[0]}\n", *_keys(model)]).rstrip()


def _kinds(kinds: Iterable[str]) -> list[Registry]:
    kinds = list(kinds)
    for kind in kinds:
        if kind not in REGISTRIES:
            raise PartError(f"no kind '{kind}'{suggestion(kind, REGISTRIES) or '.'} There is: {', '.join(REGISTRIES)}.")
    return [REGISTRIES[kind] for kind in kinds or REGISTRIES]


def _width() -> int:
    """Columns of the terminal, of which very few or very many read badly; 100 where there is none."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120)


def _beginning(model: type) -> str:
    return " ".join(_summary(model)[0].split("\n\n")[0].split())


def _table(rows: list[tuple[str, ...]], fill: bool = False) -> str:
    """Rows in columns; with ``fill`` the last column is shortened to the terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    if fill:
        head, width = sum(widths) + 2 * len(widths), _width()
        lines = [
            line[:head] + textwrap.shorten(line[head:], max(width - head, 18), placeholder="...") for line in lines
        ]
    return "\n".join(lines)


def _keys(model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[str]:
    about = {}
    for base in reversed(model.__mro__):
        about.update(_summary(base)[1] if issubclass(base, BaseModel) else {})
    # what must be given comes first, also where it stands behind the keys of a base
    for key, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        if key == "name" and issubclass(model, PartConfig):
            continue
        annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        default = _default_of(field) if defaults is None else getattr(defaults, key)
        yield f"{prefix}{key}: {type_text(annotation)}{_default(field, default)}"
        if about.get(key):
            yield textwrap.fill(
                about[key], _width(), initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
        for section in _sections(field.annotation):
            many = get_origin(field.annotation) in (list, tuple)
            inner = default if isinstance(default, section) else None
            yield from _keys(section, f"{prefix}{key}.{'0.' if many else ''}", inner)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        # A part that is looked up by name describes itself; a config class that is fixed is explained here.
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
    """An annotation in the words of a config file, e.g. ``"plain" | "referring"``, ``int >= 1``, ``list of text``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marks = [m for mark in args[1:] for m in (mark.metadata if isinstance(mark, FieldInfo) else (mark,))]
        kind = next((m.kind for m in marks if isinstance(m, PartOf)), None)
        return (f"one of {kind}" if kind else type_text(args[0])) + _bounds(marks)
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
        plain = {str: "text", type(None): "null", bool: "true | false"}
        return plain.get(annotation, "mapping" if issubclass(annotation, (BaseModel, dict)) else annotation.__name__)
    return re.sub(r"\w+\.", "", str(annotation))


def _bounds(marks: Iterable[Any]) -> str:
    marks = list(marks)
    found = [
        f"{sign} {getattr(mark, attribute)}"
        for kind, attribute, sign in (*BOUNDS, *CEILINGS)
        for mark in marks
        if isinstance(mark, kind) and isinstance(getattr(mark, attribute), (int, float))
    ]
    return f" {' and '.join(found)}" if found else ""


def _summary(model: type) -> tuple[str, dict[str, str]]:
    """A docstring's text before ``Attributes:``, and what it says of each attribute."""
    doc = inspect.cleandoc(model.__doc__ or "") if "__doc__" in vars(model) else ""
    text, _, rest = doc.partition("Attributes:")
    about: dict[str, str] = {}
    key = ""
    for line in rest.splitlines():
        if found := re.match(r"    (\w+): (.*)", line):
            key = found[1]
            about[key] = found[2]
        elif line.startswith("        ") and key:
            about[key] += " " + line.strip()
        elif line.strip() and not line.startswith(" "):
            break
    return text.replace("``", "`").strip(), {key: words.replace("``", "`") for key, words in about.items()}
