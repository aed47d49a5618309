"""Base classes of the configs of parts, and the checks that registries make on config classes.

Import these names from `longalign.registry`, which first makes imports safe from packages with unreadable metadata.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from longalign.errors import ConfigProblem, PartError
from longalign.runtime import Runtime

#: maximum of integers without a bound of their own
MAX_INT = 2**63 - 1
TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "expected a number")
    return value


def _strict(schema: Any) -> Any:
    """Returns a pydantic core schema changed to reject booleans as numbers, and strings as integers or booleans.

    Strings are accepted as floats, because some YAML parsers read ``1e-4`` as a string. pydantic's ``strict`` mode is
    not used because it also rejects lists for tuples, and YAML has no tuples.
    """
    if isinstance(schema, list):
        return [_strict(value) for value in schema]
    if not isinstance(schema, dict) or schema.get("function") == {"type": "no-info", "function": _reject_bool}:
        return schema
    schema = {key: value if key == "default" else _strict(value) for key, value in schema.items()}
    if schema.get("type") in ("int", "bool"):
        schema["strict"] = True
    if schema.get("type") == "int" and not {"le", "lt"} & schema.keys():
        schema["le"] = MAX_INT
    if schema.get("type") == "float":
        return core_schema.no_info_before_validator_function(_reject_bool, schema)
    return schema


class Section(BaseModel):
    """Base class of all config classes: a frozen pydantic model with strict validation.

    Strings are not converted to integers, and booleans are not converted to numbers. Unknown keys, infinities, NaN, and
    integers above the bound of the field (by default ``2**63 - 1``) are errors. The docstring below a field describes
    the key.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return _strict(handler(source))


class PartConfig(Section):
    """Base class of the configs of parts. A part is a component of a run, such as an encoder, selected by its name."""

    #: ``module:class`` of the part, imported when the part is built; not used if a subclass overrides `build`
    target: ClassVar[str] = ""

    name: str

    def build(self, runtime: Runtime, **parts: Any) -> Any:
        """Builds and returns the part: calls ``from_config(config, runtime, **parts)`` of the class `target`.

        Args:
            runtime: device, dtype and processes that the part is built for.
            parts: built parts that this part uses, by the names in `built_from`; only trainers use any.
        """
        module, _, name = type(self).target.partition(":")
        return getattr(import_module(module), name).from_config(self, runtime, **parts)

    @classmethod
    def built_from(cls) -> tuple[str, ...]:
        """Returns the names of the built parts that `build` takes, e.g. ``("backbone", "encoder")``.

        Empty for all kinds of parts except trainers.
        """
        return ()

    def check_run(self, run: Any) -> list[ConfigProblem]:
        """Checks whether the rest of the run's config fits this part, before any part is loaded.

        Override it in a subclass; the default returns no problems.

        Args:
            run: the `longalign.config.run.RunConfig`. Each of its keys is already validated.

        Returns:
            ``(path, message)`` for each problem. ``path`` starts at the root of ``run``, e.g. ``"loop.compile"``.
        """
        return []

    def check_files(self) -> list[ConfigProblem]:
        """Checks the files that this config refers to, before any part is loaded.

        Override it in a subclass; the default returns no problems. An override must not import torch or access the
        Hub, and need not check the configs of nested parts.

        Returns:
            ``(key, message)`` for each problem. ``key`` is a key of this config, or empty for the config as a whole.
        """
        return []


class InCodeConfig(PartConfig):
    """Config of a part that is a plain function, such as a reward ``(images, prompts)``. It has no keys but ``name``.

    The function is the class attribute ``part``.
    """

    part: ClassVar[Any] = None

    def build(self, runtime: Runtime, **parts: Any) -> Any:
        return type(self).part


def call_problem(function: Any, *args: Any, **kwargs: Any) -> str:
    """Returns why a function cannot be called with these arguments, or an empty string if it can. Does not call it."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    except ValueError:  # some C functions have no signature
        return ""
    return ""


def check_config_class(name: str, model: type[PartConfig], base: type[PartConfig]) -> None:
    """Checks the config class of a part when it is registered.

    Args:
        name: name under which the part is registered.
        model: the config class.
        base: base class of the config classes of this kind of part.

    Raises:
        PartError: if ``model`` is not derived from ``base``, is not frozen, accepts unknown keys, has a different
            ``name``, has no valid ``target`` and does not override `build`, or has a `build` with wrong arguments.
    """
    if not issubclass(model, base):
        raise PartError(f"the config class {model.__name__} must be derived from {base.__module__}.{base.__name__}")
    if model.build is PartConfig.build and not TARGET.fullmatch(model.target):
        raise PartError(f"{model.__name__} needs target = 'module:class' of its part, got {model.target!r}; set it")
    parts = model.built_from()
    if problem := call_problem(model.build, "self", "runtime", **dict.fromkeys(parts)):
        expected = ", ".join(("self", "runtime", *(("*", *parts) if parts else ())))
        raise PartError(f"{model.__name__}.build must take ({expected}): {problem}; change its arguments")
    if not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid":
        raise PartError(
            f"{model.__name__} must have frozen=True and extra='forbid' in model_config, like PartConfig; remove the "
            "override"
        )
    field = model.model_fields["name"]
    allowed = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
    if (allowed and name not in allowed) or (not field.is_required() and field.default not in (name, *(allowed or ()))):
        raise PartError(
            f"{model.__name__} declares name={field.default!r}, but is registered as '{name}'; "
            f"write name: Literal['{name}'] = '{name}'"
        )
