"""Parts by name: one `Registry` per kind, filled from entry points and from code; importing this module is cheap.

A part is found by a *config class*: a frozen pydantic model whose ``build(runtime)`` makes the part. An entry point
(group ``longalign_<kind>``) points at the config class, which lives in a module that imports no torch, so a config is
read and checked before anything heavy is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar

import catalogue
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from longalign.runtime import Runtime


class ConfigError(ValueError):
    """A config that cannot be used. ``errors`` holds ``(path, message)`` for every fault that was found."""

    def __init__(self, errors: list[tuple[str, str]]):
        self.errors = errors
        lines = "\n".join(f"  {path or '(config)'}: {message}" for path, message in errors)
        super().__init__(f"{len(errors)} error{'s' if len(errors) > 1 else ''} in the config:\n{lines}")


class PartError(ValueError):
    """A part that is unknown, broken or claimed twice."""


class PartConfig(BaseModel):
    """Base of every part's config: frozen, with extra keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    def build(self, runtime: Runtime) -> Any:
        """Makes the part, loading its weights. Imports what it needs only here."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build the part '{self.name}'")


class _InCodeConfig(PartConfig):
    """Config of a part registered in code as a ready object: it has no keys."""

    part: ClassVar[Any] = None

    def build(self, runtime: Runtime) -> Any:
        return type(self).part


@dataclass(frozen=True)
class PartInfo:
    """Where a part comes from: ``target`` is ``module:attribute``, ``owner`` its distribution and version."""

    name: str
    kind: str
    target: str
    owner: str


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


class Registry:
    """The parts of one kind.

    Args:
        kind: plural name of the kind, e.g. ``"encoders"``; entry points are read from ``longalign_<kind>``.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._in_code = catalogue.create("longalign", kind)

    # catalogue reads entry points once and merges them silently; here a name with two owners must be refused and a
    # broken part must not hide the others, so metadata is read by us and catalogue keeps what is registered in code.
    def _entries(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
        for entry in entry_points(group=f"longalign_{self.kind}"):
            found.setdefault(entry.name, {})[entry.value, _owner(entry)] = entry
        return {name: list(owners.values()) for name, owners in found.items()}

    def _local(self) -> dict[str, Any]:
        return self._in_code.get_all()

    def names(self) -> tuple[str, ...]:
        """All names, sorted, without importing any part."""
        return tuple(sorted({*self._entries(), *self._local()}))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def info(self, name: str) -> PartInfo:
        """Where a part comes from, without importing it."""
        local = self._local()
        if name in local:
            return PartInfo(name, self.kind, f"{local[name].__module__}:{local[name].__qualname__}", "this process")
        entry = self._entry(name)
        return PartInfo(name, self.kind, entry.value, _owner(entry))

    def _entry(self, name: str) -> EntryPoint:
        entries = self._entries()
        if name not in entries:
            close = difflib.get_close_matches(name, self.names(), 1, 0.5)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise PartError(f"no part '{name}' among {self.kind}{hint} There is: {', '.join(self.names())}")
        owners = entries[name]
        if len(owners) > 1:
            claims = " and ".join(f"{_owner(e)} ({e.value})" for e in owners)
            raise PartError(f"'{name}' among {self.kind} is claimed by {claims}; uninstall one of them")
        return owners[0]

    def get(self, name: str) -> type[PartConfig]:
        """The config class of a part. Loads this part's config and no other."""
        local = self._local()
        if name in local:
            return local[name]
        entry = self._entry(name)
        try:
            target = entry.load()
        except Exception as error:
            raise PartError(
                f"'{name}' among {self.kind}, from {_owner(entry)} ({entry.value}), failed to load: "
                f"{type(error).__name__}: {error}"
            ) from error
        return self._as_config(name, target)

    def _as_config(self, name: str, target: Any) -> type[PartConfig]:
        if isinstance(target, type) and issubclass(target, PartConfig):
            return target
        if isinstance(target, type) or not callable(target):
            raise PartError(f"'{name}' among {self.kind} must be a PartConfig class or a plain callable, not {target!r}")
        return type(f"{target.__name__}Config", (_InCodeConfig,), {"part": staticmethod(target)})

    def register(self, name: str, part: Any = None) -> Any:
        """Registers a part in code, for notebooks and tests; usable as a decorator.

        Args:
            name: the name, in kebab case.
            part: a `PartConfig` class, or a plain callable used as the part itself (it has no config).

        Raises:
            PartError: if the name is taken.
        """
        if part is None:
            return lambda p: self.register(name, p)
        if name in self:
            raise PartError(f"'{name}' among {self.kind} is already owned by {self.info(name).owner}")
        config = self._as_config(name, part)
        self._in_code.register(name, func=config)
        return part

    def unregister(self, name: str) -> None:
        """Removes a part registered in code."""
        if name not in self._local():
            raise PartError(f"'{name}' among {self.kind} was not registered in code; nothing to remove")
        catalogue.REGISTRY.pop(("longalign", self.kind, name))

    def validate(self, value: Any) -> PartConfig:
        """Turns ``{"name": ..., ...}``, a bare name or a config into a checked config. Raises `ConfigError`."""
        if isinstance(value, PartConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ConfigError([("", f"expected a name or a mapping with 'name', one of {', '.join(self.names())}")])
        try:
            return self.get(value["name"]).model_validate(dict(value))
        except PartError as error:
            raise ConfigError([("name", str(error))]) from error
        except ValidationError as error:
            raise ConfigError(flatten(error, self.get(value["name"]))) from error

    def build(self, config: Any, runtime: Runtime | None = None) -> Any:
        """Builds one part from its config, a mapping or a bare name."""
        return self.validate(config).build(runtime or Runtime())


def flatten(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """All faults of a pydantic error as ``(path, message)``, those inside nested parts with their full path."""
    out: list[tuple[str, str]] = []
    for detail in error.errors():
        path = ".".join(str(p) for p in detail["loc"])
        if detail["type"] == "longalign_part":
            out += [(".".join(filter(None, (path, p))), m) for p, m in detail["ctx"]["faults"]]  # type: ignore[index]
        else:
            out.append((path, _message(detail, model)))
    return out


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        for part in detail["loc"][:-1]:
            field = model.model_fields.get(str(part))
            if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
                return "this key does not exist"
            model = field.annotation
        known = list(model.model_fields)
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, 1, 0.5)
        return "this key does not exist" + (f"; did you mean '{close[0]}'?" if close else f"; there is {', '.join(known)}")
    if detail["type"] == "missing":
        return "this key is required"
    return f"{detail['msg']}, got {detail['input']!r}"


def Part(kind: str) -> Any:
    """The annotation of a config field that holds a part: ``inner: Part("rewards")``."""

    def check(value: Any) -> PartConfig:
        try:
            return REGISTRIES[kind].validate(value)
        except ConfigError as error:
            raise PydanticCustomError("longalign_part", "{text}", {"faults": error.errors, "text": str(error)}) from error

    return Annotated[SerializeAsAny[PartConfig], BeforeValidator(check)]


encoders = Registry("encoders")
rewards = Registry("rewards")
trainers = Registry("trainers")
backbones = Registry("backbones")
data = Registry("data")
segmenters = Registry("segmenters")
schedules = Registry("schedules")

REGISTRIES: dict[str, Registry] = {
    r.kind: r for r in (backbones, data, encoders, rewards, schedules, segmenters, trainers)
}
