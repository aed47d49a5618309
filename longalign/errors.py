"""Errors that a user can fix, and texts for their messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

ConfigProblem = tuple[str, str]

#: pydantic error types, rephrased for config files
PLAIN_MESSAGES = {
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "int_from_float": "expected an integer",
    "int_parsing": "expected an integer",
    "int_type": "expected an integer",
    "list_type": "expected a list",
    "model_type": "expected a mapping",
    "string_type": "expected text",
    "tuple_type": "expected a list",
}


#: maximum nesting depth of a config, and maximum number of values; shared values count once per use
MAX_DEPTH, MAX_VALUES = 64, 20_000
#: maximum number of problems in the message of an error
MAX_SHOWN = 50

_USER = re.compile(r"(\w+://)[^/\s?#@'\"]+@")
_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|signature|sig|password|passwd|credential|auth)[\w.-]*=)[^&#\s'\"]+", re.IGNORECASE
)


class ConfigError(ValueError):
    """Raised for an invalid config.

    Attributes:
        errors: ``(path, message)`` for each problem. ``path`` is the dotted path of the key, e.g. ``loop.lr``, or empty
            for the config as a whole.
    """

    def __init__(self, errors: list[ConfigProblem]):
        self.errors = errors
        lines = "\n".join(f"  {path or '(config)'}: {message}" for path, message in errors[:MAX_SHOWN])
        if len(errors) > MAX_SHOWN:
            lines += f"\n  and {len(errors) - MAX_SHOWN} more"
        super().__init__(f"{len(errors)} error{'s' if len(errors) > 1 else ''} in the config:\n{lines}")


class RunError(ValueError):
    """Raised when a run has to stop. The message gives the reason, a fix, and how to resume."""


class PartError(ValueError):
    """Raised for a part, e.g. an encoder, that is unknown, invalid, registered twice, or fails to import or build."""


def nested(problems: list[ConfigProblem]) -> PydanticCustomError:
    """Returns an error that contains ``(path, message)`` problems, to be raised in a pydantic validator.

    The paths start at the validated value. `flatten` later extracts the problems, with paths from the config's root.
    """
    return PydanticCustomError(
        "longalign_problems", "{text}", {"problems": problems, "text": str(ConfigError(problems))}
    )


def flatten(error: ValidationError, model: type[BaseModel]) -> list[ConfigProblem]:
    """Converts a pydantic error to ``(path, message)`` problems, with the dotted path of each key from the root.

    Args:
        error: error raised while validating a config with the class ``model``.
        model: config class at the root.
    """
    out: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        steps, holder = _user_path(model, detail["loc"])
        path = ".".join(map(str, steps))
        if detail["type"] == "longalign_problems":
            for inner_path, message in detail["ctx"]["problems"]:  # type: ignore[index]
                out.setdefault(".".join(filter(None, (path, inner_path))), []).append(message)
        else:
            message, shown_input = _message(detail, steps, holder)
            out.setdefault(path, []).append(message)
            inputs[path] = shown_input or inputs.get(path, "")
    return [(path, " or ".join(dict.fromkeys(messages)) + inputs.get(path, "")) for path, messages in out.items()]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error, on a GPU or the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    phrases = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns the text ``; did you mean '...'?`` with the known word that is most similar to ``word``.

    If no known word has a similarity (`difflib.SequenceMatcher.ratio`) of at least 0.5, returns an empty string.
    """
    matches = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def shorten(value: Any, limit: int = 80) -> str:
    """Returns the ``repr`` of a value without credentials, truncated to ``limit`` characters.

    Formatting stops at the limit, so that a huge value costs little time and memory.
    """
    text = ""
    for piece in _repr_pieces(value, limit):
        text += piece
        if len(text) > limit + 1000:  # enough to redact a URL that continues beyond the limit
            break
    text = redact_url(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def redact_url(text: str) -> str:
    """Returns a text in which credentials in URLs are replaced by ``***``: user, password, and secrets in the query."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1***@", text))


def full_message(error: BaseException) -> str:
    """Returns the message of an error and its notes (PEP 678), one per line, without credentials in URLs."""
    return redact_url("\n".join([str(error), *getattr(error, "__notes__", ())]))


def check_size(value: Any) -> None:
    """Raises `ConfigError` if a value contains itself, has over `MAX_DEPTH` levels or over `MAX_VALUES` values.

    A level is a list or mapping inside another. A value that is used several times counts once per use, because with
    YAML anchors, a short text can expand to a value larger than memory.
    """
    sizes: dict[int, tuple[int, int]] = {}
    too_deep = f"expected at most {MAX_DEPTH} levels of nested lists and mappings, got more; flatten the config"

    def measure(node: Any, level: int) -> tuple[int, int]:
        """Returns the number of values in ``node``, and its number of levels. ``level`` is that of ``node``, from 1."""
        if not isinstance(node, (Mapping, list, tuple, set, frozenset)):
            return 1, 0
        if id(node) not in sizes:
            if level > MAX_DEPTH:
                raise ConfigError([("", too_deep)])
            children = (*node.keys(), *node.values()) if isinstance(node, Mapping) else tuple(node)
            measured = [measure(child, level + 1) for child in children]
            sizes[id(node)] = 1 + sum(count for count, _ in measured), 1 + max((d for _, d in measured), default=0)
        count, depth = sizes[id(node)]
        if level + depth > MAX_DEPTH + 1:
            raise ConfigError([("", too_deep)])
        if count > MAX_VALUES:
            message = f"expected at most {MAX_VALUES} values, got more; shorten the config"
            raise ConfigError([("", f"{message} (a YAML anchor counts once per use)")])
        return count, depth

    measure(value, 1)


def _repr_pieces(value: Any, limit: int) -> Iterator[str]:
    """Yields the ``repr`` of a value in pieces, because the full text may be larger than memory.

    Texts in the value are truncated to ``limit + 1000`` characters.
    """
    if isinstance(value, (dict, list, tuple)):
        start, end = "{}" if isinstance(value, dict) else "[]" if isinstance(value, list) else "()"
        yield start
        for number, key in enumerate(value):
            if number:
                yield ", "
            yield from _repr_pieces(key, limit)
            if isinstance(value, dict):
                yield ": "
                yield from _repr_pieces(value[key], limit)
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
    """Returns the message of one problem of a pydantic error, and a text ``, got ...`` to append, which may be empty.

    ``steps`` and ``holder`` are as returned by `_user_path`.
    """
    if detail["type"] == "extra_forbidden":
        return f"this key does not exist{_suggest_key(str(steps[-1]), holder) if holder else ''}", ""
    if detail["type"] == "missing":
        return "this key is required", ""
    if detail["type"] == "value_error":  # the messages of our own validators include the input
        return str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"], ""
    shown_input = f", got {shorten(detail['input'])}"
    if detail["type"] == "literal_error":
        allowed = detail["ctx"]["expected"] if "ctx" in detail else ""
        hint = suggestion(detail["input"], re.findall("'([^']*)'", allowed)) if isinstance(detail["input"], str) else ""
        return f"expected {allowed}", shown_input + hint
    return PLAIN_MESSAGES.get(detail["type"], detail["msg"]), shown_input


def _suggest_key(word: str, holder: type[BaseModel]) -> str:
    """Returns a hint for an unknown key ``word`` of the config class ``holder``.

    The hint names a similar key of ``holder`` or of a config class nested in it, or else lists the keys of ``holder``.
    """
    nested_keys = {
        f"{key}.{name}": name
        for key, field in holder.model_fields.items()
        for section in _members(field.annotation)
        if isinstance(section, type) and issubclass(section, BaseModel)
        for name in section.model_fields
        if name not in holder.model_fields and name != "name"
    }
    keys = list(holder.model_fields)
    candidates = [*keys, *nested_keys.values()]
    matches = [word] if word in nested_keys.values() else difflib.get_close_matches(word, candidates, 1, 0.5)
    if not matches:
        return f"; available: {', '.join(keys)}"
    paths = matches if matches[0] in keys else [path for path, name in nested_keys.items() if name == matches[0]]
    return f"; did you mean {' or '.join(map(repr, paths))}?"


def _user_path(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[Any], type[BaseModel] | None]:
    """Returns the keys and indices in pydantic's location ``loc``, and the config class that has the last key.

    The class is None if there is no key. The tags of union members that pydantic inserts, as in ``prompts.str``, are
    removed.
    """
    steps: list[Any] = []
    annotations: list[Any] = [model]
    holder: type[BaseModel] | None = None
    for step in loc:
        models = [a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)]
        tagged = [m for m in models if m.__name__ == step]
        owner = next((m for m in models if step in m.model_fields), None)
        if owner is not None:
            steps.append(step)
            holder, annotations = owner, _members(owner.model_fields[str(step)].annotation)
        elif isinstance(step, int) or any(_is_mapping(a) for a in annotations):
            steps.append(step)
            inner = [arg for a in annotations for arg in get_args(a)[-1 if _is_mapping(a) else 0 :]]
            annotations = [member for arg in inner for member in _members(arg)]
        elif len(models) > 1 and tagged:
            annotations = list(tagged)
        elif models:
            steps.append(step)
            holder, annotations = models[0], []
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
