"""Errors a user can act on: every fault of a config at once, each with its path in the config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

ConfigProblem = tuple[str, str]

#: pydantic's words for types, in those of a config file
PLAIN = {
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "int_from_float": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "list_type": "expected a list",
    "model_type": "expected a mapping",
    "string_type": "expected text",
    "tuple_type": "expected a list",
}


#: most levels that a value may be nested, and most values in it, one that stands in several places counted at each
DEEPEST, LARGEST = 64, 20_000
#: most faults that the text of an error names
SHOWN = 50

_USER = re.compile(r"(\w+://)[^/\s?#@'\"]+@")
_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|signature|sig|password|passwd|credential|auth)[\w.-]*=)[^&#\s'\"]+", re.IGNORECASE
)


class ConfigError(ValueError):
    """A config that cannot be used. ``errors`` holds ``(path, message)`` for every fault that was found."""

    def __init__(self, errors: list[ConfigProblem]):
        self.errors = errors
        lines = "\n".join(f"  {path or '(config)'}: {message}" for path, message in errors[:SHOWN])
        if len(errors) > SHOWN:
            lines += f"\n  and {len(errors) - SHOWN} more"
        super().__init__(f"{len(errors)} error{'s' if len(errors) > 1 else ''} in the config:\n{lines}")


class RunError(ValueError):
    """A run that had to stop; the message says why, what to change, and how it is resumed."""


class PartError(ValueError):
    """A part that is unknown, broken or claimed twice."""


def nested(problems: list[ConfigProblem]) -> PydanticCustomError:
    """The faults as an error for a pydantic validator to raise; `flatten` takes them out again, paths complete."""
    return PydanticCustomError(
        "longalign_problems", "{text}", {"problems": problems, "text": str(ConfigError(problems))}
    )


def flatten(error: ValidationError, model: type[BaseModel]) -> list[ConfigProblem]:
    """All faults of a pydantic error as ``(path, message)``, those inside nested parts with their full path.

    Args:
        error: what validating ``model`` raised.
        model: the model, from which the keys that exist are known.
    """
    out: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        steps, holder = _follow(model, detail["loc"])
        path = ".".join(map(str, steps))
        if detail["type"] == "longalign_problems":
            for inner, message in detail["ctx"]["problems"]:  # type: ignore[index]
                out.setdefault(".".join(filter(None, (path, inner))), []).append(message)
        else:
            message, shown = _message(detail, steps, holder)
            out.setdefault(path, []).append(message)
            got[path] = shown or got.get(path, "")
    return [(path, " or ".join(dict.fromkeys(messages)) + got.get(path, "")) for path, messages in out.items()]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean '...'?`` for a misspelt word, or an empty string where nothing known is close."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def shorten(value: Any, limit: int = 80) -> str:
    """``repr`` of a value without credentials, truncated to ``limit`` characters; only so much of it is looked at."""
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit + 1000:  # enough to find an address that goes on behind the limit
            break
    text = redact_url(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def redact_url(text: str) -> str:
    """A text with ``***`` in place of the credentials in addresses: user and password, and secrets of the query."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1***@", text))


def check_size(value: Any) -> None:
    """Raises `ConfigError` for a value that is nested too deeply, contains itself, or is too large written out.

    YAML's anchors let a short text stand for a value that no memory holds; one that is shared is counted wherever it
    stands.
    """
    seen: dict[int, tuple[int, int]] = {}

    def measure(inner: Any, level: int) -> tuple[int, int]:
        """Number of values, and of levels."""
        if not isinstance(inner, (Mapping, list, tuple, set, frozenset)):
            return 1, 0
        if id(inner) not in seen:
            if level > DEEPEST:
                raise ConfigError([("", f"expected at most {DEEPEST} levels of lists and mappings in each other")])
            parts = (*inner.keys(), *inner.values()) if isinstance(inner, Mapping) else tuple(inner)
            sizes = [measure(part, level + 1) for part in parts]
            seen[id(inner)] = 1 + sum(size for size, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
        size, deep = seen[id(inner)]
        if level + deep > DEEPEST + 1:
            raise ConfigError([("", f"expected at most {DEEPEST} levels of lists and mappings in each other")])
        if size > LARGEST:
            raise ConfigError(
                [("", f"expected at most {LARGEST} values, those shared by anchors counted where they are used")]
            )
        return size, deep

    measure(value, 1)


def _pieces(value: Any, limit: int) -> Iterator[str]:
    """``repr`` of a value, piece by piece: a value may be larger than memory once it is written out."""
    if isinstance(value, (dict, list, tuple)):
        start, end = "{}" if isinstance(value, dict) else "[]" if isinstance(value, list) else "()"
        yield start
        for number, key in enumerate(value):
            if number:
                yield ", "
            yield from _pieces(key, limit)
            if isinstance(value, dict):
                yield ": "
                yield from _pieces(value[key], limit)
        yield f",{end}" if isinstance(value, tuple) and len(value) == 1 else end
    elif isinstance(value, (str, bytes)):
        yield repr(value[: limit + 1000])
    elif isinstance(value, int) and value.bit_length() > 1000:
        yield f"a number of about {round(value.bit_length() * 0.30103)} digits"
    else:
        try:
            yield repr(value)
        except Exception:
            yield f"a {type(value).__name__} that cannot be shown"


def _message(detail: ErrorDetails, steps: list[Any], holder: type[BaseModel] | None) -> tuple[str, str]:
    """What is wrong, and what came."""
    if detail["type"] == "extra_forbidden":
        return f"this key does not exist{_meant(str(steps[-1]), holder) if holder else ''}", ""
    if detail["type"] == "missing":
        return "this key is required", ""
    if detail["type"] == "value_error":  # our own validators say themselves what came
        return str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"], ""
    came = f", got {shorten(detail['input'])}"
    if detail["type"] == "literal_error":
        allowed = detail["ctx"]["expected"] if "ctx" in detail else ""
        near = suggestion(detail["input"], re.findall("'([^']*)'", allowed)) if isinstance(detail["input"], str) else ""
        return f"expected {allowed}", came + near
    return PLAIN.get(detail["type"], detail["msg"]), came


def _meant(word: str, holder: type[BaseModel]) -> str:
    """What a key that does not exist may have been: one inside a section, or a similar one."""
    inside = {
        f"{key}.{name}": name
        for key, field in holder.model_fields.items()
        for section in _members(field.annotation)
        if isinstance(section, type) and issubclass(section, BaseModel)
        for name in section.model_fields
        if name not in holder.model_fields and name != "name"
    }
    known = list(holder.model_fields)
    # the best match of all; a key is one of its own level where both are equally near
    close = [word] if word in inside.values() else difflib.get_close_matches(word, [*known, *inside.values()], 1, 0.5)
    if not close:
        return f"; available: {', '.join(known)}"
    found = close if close[0] in known else [path for path, name in inside.items() if name == close[0]]
    return f"; did you mean {' or '.join(map(repr, found))}?"


def _follow(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[Any], type[BaseModel] | None]:
    """The steps of ``loc`` that a user wrote, and the model that holds the last of them.

    Pydantic puts the tags of a union's members between them (``prompts.str``, ``prompts.list[str]``); they are dropped.
    """
    steps: list[Any] = []
    here: list[Any] = [model]
    holder: type[BaseModel] | None = None
    for step in loc:
        models = [m for m in here if isinstance(m, type) and issubclass(m, BaseModel)]
        tagged = [m for m in models if m.__name__ == step]
        fields = next((m for m in models if step in m.model_fields), None)
        if fields is not None:
            steps.append(step)
            holder, here = fields, _members(fields.model_fields[str(step)].annotation)
        elif isinstance(step, int) or any(_is_mapping(a) for a in here):
            steps.append(step)
            here = [m for a in here for inner in get_args(a)[-1 if _is_mapping(a) else 0 :] for m in _members(inner)]
        elif len(models) > 1 and tagged:
            here = list(tagged)
        elif models:
            steps.append(step)
            holder, here = models[0], []
    return steps, holder


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if isinstance(annotation, type) or get_origin(annotation) in (list, tuple, dict):
        return [annotation]
    return [m for a in get_args(annotation) for m in _members(a)] or [annotation]
