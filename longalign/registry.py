"""Parts by name: one `Registry` per kind, filled from entry points and from code; importing this module is cheap.

A part is found by a *config class*: a frozen pydantic model whose ``build(runtime)`` makes the part. An entry point
(group ``longalign_<kind>``) points at the config class, which lives in a module that imports no torch, so a config is
read and checked before anything heavy is imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from longalign.discovery import PREFIX, discover, owner, skip_unreadable
from longalign.errors import ConfigError, ConfigProblem, PartError, check_size, flatten, nested, shorten, suggestion
from longalign.runtime import Runtime

__all__ = [
    "REGISTRIES",
    "ConfigError",
    "Part",
    "PartConfig",
    "PartError",
    "PartInfo",
    "Registry",
    "backbones",
    "data",
    "encoders",
    "gradient_steps",
    "rewards",
    "segmenters",
    "trainers",
]

try:
    import catalogue
except Exception:  # it reads the entry points of all distributions when it is imported
    skip_unreadable()
    import catalogue

KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "expected a number")
    return value


def _strict(schema: Any) -> Any:
    """A core schema in which true and false are no numbers, and texts neither whole numbers nor true or false.

    A text may be a number with a point or an exponent: other readers of YAML take ``1e-4`` for one. pydantic's own
    ``strict`` would also take no list where a tuple is meant, which is all that YAML has.
    """
    if isinstance(schema, list):
        return [_strict(value) for value in schema]
    if not isinstance(schema, dict) or schema.get("function") == {"type": "no-info", "function": _no_truth}:
        return schema
    schema = {key: value if key == "default" else _strict(value) for key, value in schema.items()}
    if schema.get("type") in ("int", "bool"):
        schema["strict"] = True
    if schema.get("type") == "int" and not {"le", "lt"} & schema.keys():
        schema["le"] = 2**63 - 1
    return core_schema.no_info_before_validator_function(_no_truth, schema) if schema.get("type") == "float" else schema


class Section(BaseModel):
    """Base of everything in a config: frozen; extra keys, infinities and NaN are errors, and so are texts for whole
    numbers, true and false for numbers, and whole numbers beyond 64 bits."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return _strict(handler(source))


#: what a plugin with a mistake raises, rather than a user's input or the machine
MISTAKES = (
    TypeError,
    AttributeError,
    LookupError,
    NameError,
    ImportError,
    NotImplementedError,
    AssertionError,
    RecursionError,
)


class PartConfig(Section):
    """Base of every part's config."""

    name: str

    def build(self, runtime: Runtime) -> Any:
        """Makes the part, loading its weights. Imports what it needs only here."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build the part '{self.name}'")

    def check_run(self, run: Any) -> list[ConfigProblem]:
        """What stands against this part in a whole run, as ``(path, message)``; nothing by default.

        A part overrides this to say what it needs of the others, so that the run is refused before any is loaded.

        Args:
            run: the `longalign.config.RunConfig`, each of its keys already valid on its own.
        """
        return []

    def check_files(self) -> list[ConfigProblem]:
        """What of the files that this part names is not there or of no use, as ``(key, message)``; nothing by default.

        A part overrides this, so that a run stops before anything is loaded. It must not import torch nor ask the hub.
        Parts inside are asked themselves.
        """
        return []

    def widths(self) -> tuple[int | None, int | None]:
        """Widths of the states and of the pooled embedding that an encoder gives or a backbone takes: as far as the
        config and small files on this machine tell, None where they do not."""
        return None, None


class _InCodeConfig(PartConfig):
    """Config of a part that is a ready callable: it has no keys."""

    part: ClassVar[Any] = None
    embeds: ClassVar[bool] = False  # of a reward

    def build(self, runtime: Runtime) -> Any:
        return type(self).part


@dataclass(frozen=True)
class PartInfo:
    """Where a part comes from: ``target`` is ``module:attribute``, ``owner`` its distribution and version."""

    name: str
    kind: str
    target: str
    owner: str


class Registry:
    """The parts of one kind.

    Args:
        kind: plural name of the kind, e.g. ``"encoders"``; entry points are read from ``longalign_<kind>``.
        bases: ``module:class`` of what a part must be an instance of, any of them; anything if there are none.
        function: the arguments of a plain function that may be a part of this kind; none may if it is empty.
    """

    def __init__(self, kind: str, bases: Sequence[str] = (), function: Sequence[str] = ()):
        self.kind, self.bases, self.function = kind, tuple(bases), tuple(function)
        self._in_code = catalogue.create("longalign", kind)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self.names())})"

    # catalogue reads entry points once, overwrites duplicates silently and loads all of them on a miss; so metadata is
    # read by us, and catalogue keeps what is registered in code.
    def _entries(self) -> dict[str, list[EntryPoint]]:
        return discover().groups.get(PREFIX + self.kind, {})

    def _local(self) -> dict[str, type[PartConfig]]:
        return self._in_code.get_all()

    def names(self) -> tuple[str, ...]:
        """All names, sorted, without importing any part."""
        return tuple(sorted({*self._entries(), *self._local()}))

    def __contains__(self, name: object) -> bool:
        return name in self._entries() or name in self._local()

    def infos(self, name: str) -> list[PartInfo]:
        """Everyone who discover a name, without importing it: one, unless distributions quarrel about it."""
        local = self._local().get(name)
        found = [PartInfo(name, self.kind, e.value, owner(e)) for e in self._entries().get(name, [])]
        if local is not None:
            found.insert(0, PartInfo(name, self.kind, f"{local.__module__}:{local.__qualname__}", "this process"))
        return found

    def info(self, name: str) -> PartInfo:
        """Where a part comes from, without importing it. Raises `PartError` if the name is unknown or claimed twice."""
        found = self.infos(name)
        if not found:
            bad = "".join(f" (The entry points of {who} cannot be read: {why})" for who, why in discover().malformed)
            bad += "".join(f" ({problem})" for entry, problem in misnamed() if entry.name == name)
            raise PartError(
                f"no part {shorten(name)} among {self.kind}{suggestion(str(name), self.names()) or '.'}"
                f" There is: {', '.join(self.names()) or 'nothing'}.{bad}"
            )
        if len(found) > 1:
            claims = " and ".join(f"{i.owner} ({i.target})" for i in found)
            raise PartError(f"'{name}' among {self.kind} is claimed by {claims}; uninstall or unregister one of them")
        return found[0]

    def get(self, name: str) -> type[PartConfig]:
        """The config class of a part. Loads this part's config and no other.

        Raises:
            PartError: if the name is unknown, claimed twice, or its plugin fails to import or is no part.
        """
        info = self.info(name)
        local = self._local()
        if name in local:
            return local[name]
        entry = self._entries()[name][0]
        try:
            if not entry.pattern.match(entry.value):
                raise ValueError(f"the target of an entry point must be 'module:attribute', not {entry.value!r}")
            return self._as_config(name, entry.load())
        except (Exception, SystemExit) as error:
            # A refusal of ours already says all; what the plugin raised itself is named by its type.
            what = error if isinstance(error, PartError) else f"{type(error).__name__}: {error}"
            raise PartError(
                f"'{name}' among {self.kind}, from {info.owner} ({info.target}), failed to load: {what}"
            ) from error

    def _as_config(self, name: str, target: Any) -> type[PartConfig]:
        if not KEBAB.fullmatch(name):
            raise PartError(f"the name {name!r} must be in kebab case, like 'clip-segment'")
        if isinstance(target, type) and issubclass(target, PartConfig):
            _inspect(name, target, self.kind)
            return target
        if isinstance(target, type) or not callable(target) or not self.function:
            function = f", or a function ({', '.join(self.function)})" if self.function else ""
            raise PartError(f"the part must be a PartConfig class with a build method{function}, not {target!r}")
        if problem := _problem_of_call(target, *self.function):
            raise PartError(f"the function must take ({', '.join(self.function)}): {problem}")
        made = type(
            getattr(target, "__name__", type(target).__name__), (_InCodeConfig,), {"part": staticmethod(target)}
        )
        made.__module__ = getattr(target, "__module__", made.__module__)
        made.__qualname__ = getattr(target, "__qualname__", made.__name__)
        made.__doc__ = target.__doc__
        return made

    def register(self, name: str, part: Any = None) -> Any:
        """Registers a part in code, for notebooks and tests; usable as a decorator.

        Defining the same class or function once more, as running a notebook's cell again does, replaces it.

        Args:
            name: the name, in kebab case.
            part: a `PartConfig` class, or a plain callable used as the part itself (it has no config).

        Raises:
            PartError: if the name is taken, is not in kebab case, or the part is neither of these.
        """
        if part is None:
            return lambda p: self.register(name, p)
        config = self._as_config(name, part)
        before = self._local().get(name)
        again = before is not None and (before.__module__, before.__qualname__) == (
            config.__module__,
            config.__qualname__,
        )
        if name in self and (not again or "<" in config.__qualname__):
            raise PartError(f"'{name}' among {self.kind} is already owned by {self.infos(name)[0].owner}")
        self._in_code.register(name, func=config)
        return part

    def unregister(self, name: str) -> None:
        """Removes a part registered in code."""
        if name not in self._local():
            raise PartError(f"'{name}' among {self.kind} was not registered in code; nothing to remove")
        catalogue.REGISTRY.pop(("longalign", self.kind, name))

    def validate(self, value: Any) -> PartConfig:
        """Turns ``{"name": ..., ...}``, a bare name or a config into a checked config. Raises `ConfigError`."""
        check_size(value)
        return self._validate(value)

    def _validate(self, value: Any) -> PartConfig:
        given = type(value) if isinstance(value, PartConfig) else None
        if isinstance(value, PartConfig):
            value = value.model_dump(warnings=False)  # model_copy(update=...) does not validate, so it is done here
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            known = ", ".join(self.names())
            raise ConfigError([("", f"expected a name or a mapping with 'name', one of {known}; got {shorten(value)}")])
        name = value["name"]
        try:
            model = self.get(name)
            if given not in (None, model):
                raise PartError(f"'{name}' among {self.kind} is {model.__name__}, not {given.__name__}")
            return model.model_validate(dict(value))
        except ValidationError as error:
            raise ConfigError(flatten(error, self.get(name))) from error
        except PartError as error:
            raise ConfigError([("name", str(error))]) from error
        except Exception as error:
            text = f"the config class from {self.info(name).owner} failed: {type(error).__name__}: {error}"
            raise ConfigError([("", text)]) from error

    def build(self, config: Any, runtime: Runtime | None = None, **parts: Any) -> Any:
        """Builds one part from its config, a mapping or a bare name.

        Args:
            config: e.g. ``{"name": "clip-segment", "checkpoint": "mini/clip"}``.
            runtime: device, dtype and processes; this machine's (`Runtime.detect`) if None, and the CPU for segmenters.
            parts: the ready parts that a trainer is built from (``backbone``, ``encoder``, ``rewards``).

        Raises:
            ConfigError: if the config is not valid.
            PartError: if what is built is no part of this kind, or building it fails by a mistake of its plugin.
        """
        checked = self.validate(config)
        if runtime is None:
            runtime = Runtime() if self is segmenters else Runtime.detect()
        return self.construct(checked, runtime, **parts)

    def construct(self, config: PartConfig, runtime: Runtime, **parts: Any) -> Any:
        """As `build`, from a config that is checked."""
        name = config.name
        whose = self.infos(name)[0].owner if name in self else f"{type(config).__module__}"
        try:
            made = config.build(runtime, **parts)
        except MISTAKES as error:
            if whose.startswith("longalign "):
                raise
            raise PartError(
                f"'{name}' among {self.kind}, from {whose}, failed to build: {type(error).__name__}: {error}"
            ) from error
        if self.function and callable(made):
            if problem := _problem_of_call(made, *self.function):
                wanted = f"the function must take ({', '.join(self.function)})"
                raise PartError(f"'{name}' among {self.kind}, from {whose}: {wanted}: {problem}")
            return made
        if not self.bases:
            return made
        bases = [getattr(import_module(module), kind) for module, _, kind in (b.partition(":") for b in self.bases)]
        if not isinstance(made, tuple(bases)):
            wanted = " or ".join(base.replace(":", ".") for base in self.bases)
            what = "a function" if inspect.isfunction(made) else f"a {type(made).__name__}"
            raise PartError(f"'{name}' among {self.kind}, from {whose}, was built as {what}, which is no {wanted}")
        return made


def misnamed() -> list[tuple[EntryPoint, str]]:
    """Entry points in groups that no kind has, such as ``longalign_encoder``, each with what is wrong with it."""
    unknown = [
        e
        for group, parts in discover().groups.items()
        for several in parts.values()
        for e in several
        if group.removeprefix(PREFIX) not in REGISTRIES
    ]
    groups = [PREFIX + kind for kind in REGISTRIES]
    return [
        (
            entry,
            f"{owner(entry)} discover '{entry.name}' in the group '{entry.group}', which is not read"
            f"{suggestion(entry.group, groups) or '; the groups are ' + ', '.join(groups)}",
        )
        for entry in (*unknown, *discover().misnamed)
    ]


def _problem_of_call(function: Any, *values: Any, **named: Any) -> str:
    """Why a function cannot be called so, or an empty text."""
    try:
        inspect.signature(function).bind(*values, **named)
    except TypeError as error:
        return str(error)
    except ValueError:  # functions of C do not always say what they take
        return ""
    return ""


def _place(model: type) -> tuple[str, str]:
    return model.__module__, model.__qualname__


def _inspect(name: str, model: type[PartConfig], kind: str) -> None:
    """Refuses a config class that would go wrong later, with what its author should do."""
    if model.build is PartConfig.build:
        raise PartError(f"{model.__name__} has no build(self, runtime) method")
    parts = (*getattr(model, "needs", ("backbone", "encoder")), "rewards") if kind == "trainers" else ()
    if problem := _problem_of_call(model.build, "self", "runtime", **dict.fromkeys(parts)):
        wanted = ", ".join(("self", "runtime", *(("*", *parts) if parts else ())))
        raise PartError(f"{model.__name__}.build must take ({wanted}): {problem}")
    if not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid":
        raise PartError(f"{model.__name__} must keep frozen=True and extra='forbid' of PartConfig's model_config")
    field = model.model_fields["name"]
    allowed = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
    if (allowed and name not in allowed) or (not field.is_required() and field.default not in (name, *(allowed or ()))):
        raise PartError(
            f"{model.__name__} calls itself {field.default!r}, but is registered as '{name}'; "
            f"write name: Literal['{name}'] = '{name}'"
        )


@dataclass(frozen=True)
class PartOf:
    """Mark on an annotation that `Part` made, read by `longalign.describe`."""

    kind: str


def Part(kind: str) -> Any:
    """The annotation of a config field that holds a part: ``inner: Part("rewards")``."""

    def check(value: Any) -> PartConfig:
        try:
            return REGISTRIES[kind]._validate(value)  # its size has been checked with what holds it
        except ConfigError as error:
            raise nested(error.errors) from error

    # SerializeAsAny: without it a dump keeps the fields of PartConfig only.
    return Annotated[SerializeAsAny[PartConfig], BeforeValidator(check), PartOf(kind)]


encoders = Registry("encoders", ["longalign.encoders.base:Encoder"])
rewards = Registry("rewards", ["longalign.rewards.base:Reward"], function=("images", "prompts"))
trainers = Registry("trainers", ["longalign.trainers.base:Trainer"])
backbones = Registry("backbones", ["longalign.backbones.base:Backbone"])
data = Registry("data", ["longalign.data.base:Data", "longalign.data.stream:Stream"])
segmenters = Registry("segmenters", function=("prompt", "count"))
gradient_steps = Registry("gradient_steps", ["longalign.gradient_steps.base:GradientStepSelector"])

REGISTRIES: dict[str, Registry] = {
    r.kind: r for r in (backbones, data, encoders, rewards, gradient_steps, segmenters, trainers)
}
