"""Registries of parts, one `Registry` per kind, filled from entry points and from code.

A part is an exchangeable component of a run that a config selects by name. Its kind is one of `REGISTRIES`, such as
encoders or rewards. Each part has a *config class*: a frozen pydantic model whose ``build(runtime)`` builds the part.
An entry point in the group ``longalign_<kind>`` points at the config class. Modules of config classes do not import
torch, so that configs are validated before heavy imports.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from longalign.discovery import PREFIX, discover, owner, skip_unreadable, version_problem
from longalign.errors import ConfigError, PartError, check_size, flatten, nested, shorten, suggestion
from longalign.runtime import Runtime

__all__ = [
    "REGISTRIES",
    "ConfigError",
    "Part",
    "PartConfig",
    "PartError",
    "PartInfo",
    "Registry",
    "Section",
    "backbones",
    "data",
    "edits",
    "encoders",
    "gradient_steps",
    "metrics",
    "rewards",
    "segmenters",
    "trainers",
]

try:
    import catalogue
except Exception:  # catalogue reads the entry points of all distributions, as pydantic does for the first config class
    skip_unreadable()
    import catalogue

from longalign.parts import MAX_INT as MAX_INT
from longalign.parts import InCodeConfig, PartConfig, Section, call_problem, check_config_class

#: mark of a part's kind in a JSON schema
KIND = "x-longalign-kind"
KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


#: errors that indicate a bug in a plugin rather than invalid input or a failure of the machine
PLUGIN_BUGS = (
    TypeError,
    AttributeError,
    LookupError,
    NameError,
    ImportError,
    NotImplementedError,
    AssertionError,
    RecursionError,
)


@dataclass(frozen=True)
class PartInfo:
    """Where a registered part, such as an encoder or reward, comes from.

    Attributes:
        name: name under which the part is registered, e.g. ``"t5"``.
        kind: plural name of the kind, e.g. ``"encoders"``.
        target: ``module:attribute`` of the part's config class, or of a plain function.
        owner: name and version of the distribution that provides the part, or ``"this process"`` for a part registered
            in code.
    """

    name: str
    kind: str
    target: str
    owner: str


class Registry:
    """The parts of one kind, such as all encoders, by name.

    Args:
        kind: plural name of the kind, e.g. ``"encoders"``; entry points are read from the group ``longalign_<kind>``.
        config: base class of the config classes of this kind, as ``module:class``.
        bases: classes, as ``module:class``; a built part must be an instance of one of them. Empty: any object is
            accepted.
        function: argument names of a plain function that is a part of this kind, e.g. ``("images", "prompts")``; empty
            if a plain function cannot be a part of this kind.
    """

    def __init__(
        self,
        kind: str,
        *,
        config: str = "longalign.registry:PartConfig",
        bases: Sequence[str] = (),
        function: Sequence[str] = (),
    ):
        self.kind, self.bases, self.function = kind, tuple(bases), tuple(function)
        self._config = config
        self._in_code = catalogue.create("longalign", kind)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self.names())})"

    # catalogue reads entry points only once, silently overwrites duplicates and loads all of them on a miss. So entry
    # points are read in `longalign.discovery`, and catalogue only holds parts registered in code.
    def _entries(self) -> dict[str, list[EntryPoint]]:
        return discover().groups.get(PREFIX + self.kind, {})

    def _local(self) -> dict[str, type[PartConfig]]:
        return self._in_code.get_all()

    def names(self) -> tuple[str, ...]:
        """Returns the names of all parts of this kind in alphabetical order, without importing the parts."""
        return tuple(sorted({*self._entries(), *self._local()}))

    def __contains__(self, name: object) -> bool:
        return name in self._entries() or name in self._local()

    def infos(self, name: str) -> list[PartInfo]:
        """Returns a `PartInfo` for each part registered under a name, without importing any.

        Empty for an unknown name. More than one is a conflict, for which `info` raises an error.
        """
        local = self._local().get(name)
        infos = [PartInfo(name, self.kind, e.value, owner(e)) for e in self._entries().get(name, [])]
        if local is not None:
            infos.insert(0, PartInfo(name, self.kind, f"{local.__module__}:{local.__qualname__}", "this process"))
        return infos

    def info(self, name: str) -> PartInfo:
        """Returns the `PartInfo` of the part with this name, without importing the part.

        Raises:
            PartError: if the name is unknown or registered twice.
        """
        infos = self.infos(name)
        if not infos:
            notes = "".join(f" (The entry points of {dist} cannot be read: {e})" for dist, e in discover().malformed)
            notes += "".join(f" ({problem})" for entry, problem in misnamed_entry_points() if entry.name == name)
            raise PartError(
                f"no part {shorten(name)} of kind '{self.kind}'{suggestion(str(name), self.names()) or '.'}"
                f" Available: {', '.join(self.names()) or 'none'}.{notes}"
            )
        if len(infos) > 1:
            owners = " and ".join(f"{i.owner} ({i.target})" for i in infos)
            raise PartError(
                f"part '{name}' of kind '{self.kind}' is registered by {owners}; uninstall or unregister one of them"
            )
        return infos[0]

    def get(self, name: str) -> type[PartConfig]:
        """Returns the config class of a part. Of all parts, only the module of this config class is imported.

        Raises:
            PartError: if the name is unknown or registered twice, or its plugin fails to import, is invalid, or
                requires a different version of longalign.
        """
        info = self.info(name)
        local = self._local()
        if name in local:
            return local[name]
        entry = self._entries()[name][0]
        try:
            if not entry.pattern.match(entry.value):
                raise ValueError(f"expected 'module:attribute' as target of the entry point, got {entry.value!r}")
            if problem := version_problem(entry):
                raise PartError(problem)
            return self._as_config(name, entry.load())
        except (Exception, SystemExit) as error:
            # a PartError is complete; errors of the plugin are prefixed with their type
            reason = error if isinstance(error, PartError) else f"{type(error).__name__}: {error}"
            raise PartError(
                f"part '{name}' of kind '{self.kind}', from {info.owner} ({info.target}), failed to load: {reason}"
            ) from error

    def _as_config(self, name: str, target: Any) -> type[PartConfig]:
        if not KEBAB.fullmatch(name):
            raise PartError(f"the name {name!r} is invalid; expected kebab case, e.g. 'clip-segment'; rename the part")
        module, _, attribute = self._config.partition(":")
        base = getattr(import_module(module), attribute)
        if isinstance(target, type) and issubclass(target, PartConfig):
            check_config_class(name, target, base)
            return target
        if isinstance(target, type) or not callable(target) or not self.function:
            function = f", or a function ({', '.join(self.function)})" if self.function else ""
            raise PartError(f"'{name}' must be a {attribute} class{function}, got {target!r}")
        if problem := call_problem(target, *self.function):
            raise PartError(f"'{name}' must take ({', '.join(self.function)}): {problem}; change its arguments")
        config = type(
            getattr(target, "__name__", type(target).__name__), (InCodeConfig, base), {"part": staticmethod(target)}
        )
        config.__module__ = getattr(target, "__module__", config.__module__)
        config.__qualname__ = getattr(target, "__qualname__", config.__name__)
        config.__doc__ = target.__doc__
        return config

    def register(self, name: str, part: Any = None) -> Any:
        """Registers a part in code, for notebooks and tests.

        A class or function that is defined and registered again, e.g. in a notebook cell, replaces its earlier version.

        Args:
            name: name of the part in kebab case, e.g. ``"my-reward"``.
            part: the part's config class, or a plain function that is the part itself (without config keys). None
                returns a decorator for either.

        Returns:
            ``part`` unchanged, or the decorator.

        Raises:
            PartError: if the name is taken or not in kebab case, or the part is invalid.
        """
        if part is None:
            return lambda p: self.register(name, p)
        config = self._as_config(name, part)
        previous = self._local().get(name)
        location = (config.__module__, config.__qualname__)
        redefined = previous is not None and (previous.__module__, previous.__qualname__) == location
        if name in self and (not redefined or "<" in config.__qualname__):
            owner = self.infos(name)[0].owner
            raise PartError(
                f"part '{name}' of kind '{self.kind}' is already registered by {owner}; choose a different name"
            )
        self._in_code.register(name, func=config)
        return part

    def unregister(self, name: str) -> None:
        """Removes a part that was registered in code. Raises PartError if there is no such part."""
        if name not in self._local():
            raise PartError(f"part '{name}' of kind '{self.kind}' was not registered in code; nothing to remove")
        catalogue.REGISTRY.pop(("longalign", self.kind, name))

    def validate(self, value: Any) -> PartConfig:
        """Returns the validated config of a part.

        Args:
            value: a mapping with ``name`` and the keys of the part, a name alone (all keys at their defaults), or a
                `PartConfig`, which is validated again.

        Raises:
            ConfigError: if the name is unknown, the part cannot be imported or a key is invalid; lists all problems.
        """
        check_size(value)
        return self._validate(value)

    def _validate(self, value: Any) -> PartConfig:
        config_class = type(value) if isinstance(value, PartConfig) else None
        if isinstance(value, PartConfig):
            value = value.model_dump(warnings=False)  # validate again, because model_copy(update=...) does not
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            names = ", ".join(self.names())
            raise ConfigError([("", f"expected a name or a mapping with 'name', one of {names}; got {shorten(value)}")])
        name = value["name"]
        try:
            model = self.get(name)
            if config_class not in (None, model):
                raise PartError(
                    f"part '{name}' of kind '{self.kind}' has the config class {model.__name__}, got "
                    f"{config_class.__name__}; use {model.__name__}"
                )
            return model.model_validate(dict(value))
        except ValidationError as error:
            raise ConfigError(flatten(error, self.get(name))) from error
        except PartError as error:
            raise ConfigError([("name", str(error))]) from error
        except Exception as error:
            text = f"the config class from {self.info(name).owner} failed: {type(error).__name__}: {error}"
            raise ConfigError([("", text)]) from error

    def build(self, config: Any, runtime: Runtime | None = None, **parts: Any) -> Any:
        """Builds and returns one part of this kind, such as an encoder, with its weights.

        Args:
            config: a name, a `PartConfig`, or a mapping, e.g. ``{"name": "clip-segment", "checkpoint": "mini/clip"}``.
            runtime: device, dtype and processes. If None, those of `Runtime.detect`, or the CPU for segmenters.
            parts: for a trainer, the built parts that it uses (``backbone``, ``encoder``, ``rewards``).

        Raises:
            ConfigError: if the config is invalid.
            PartError: if the result is not a part of this kind, or the code of a plugin fails.
            ValueError: if ``parts`` contains a part that the trainer does not use, or any part for another kind.
        """
        validated = self.validate(config)
        if runtime is None:
            runtime = Runtime() if self is segmenters else Runtime.detect()
        return self.construct(validated, runtime, **parts)

    def construct(self, config: PartConfig, runtime: Runtime, **parts: Any) -> Any:
        """Builds and returns a part from a config that is already validated; see `build` for arguments and errors."""
        name = config.name
        origin = self.infos(name)[0].owner if name in self else f"{type(config).__module__}"
        for key in parts.keys() - {*config.built_from()}:
            raise ValueError(f"'{name}' uses no {key}, got {shorten(parts[key])}; remove this argument")
        try:
            part = config.build(runtime, **parts)
        except PLUGIN_BUGS as error:
            if origin.startswith("longalign "):
                raise
            raise PartError(
                f"part '{name}' of kind '{self.kind}', from {origin}, failed to build: {type(error).__name__}: {error}"
            ) from error
        if self.function and callable(part):
            if problem := call_problem(part, *self.function):
                expected = f"the function must take ({', '.join(self.function)})"
                raise PartError(
                    f"part '{name}' of kind '{self.kind}', from {origin}: {expected}: {problem}; change its arguments"
                )
            return part
        if not self.bases:
            return part
        bases = [getattr(import_module(module), kind) for module, _, kind in (b.partition(":") for b in self.bases)]
        if not isinstance(part, tuple(bases)):
            expected = " or ".join(base.replace(":", ".") for base in self.bases)
            actual = "function" if inspect.isfunction(part) else type(part).__name__
            raise PartError(
                f"part '{name}' of kind '{self.kind}', from {origin}: build must return {expected}, got {actual}"
            )
        return part


def misnamed_entry_points() -> list[tuple[EntryPoint, str]]:
    """Returns ``(entry point, error message)`` for each entry point in an unknown group, e.g. ``longalign_encoder``."""
    unknown = [
        entry
        for group, names in discover().groups.items()
        for entries in names.values()
        for entry in entries
        if group.removeprefix(PREFIX) not in REGISTRIES
    ]
    groups = [PREFIX + kind for kind in REGISTRIES]
    return [
        (
            entry,
            f"{owner(entry)} registers '{entry.name}' in the unknown group '{entry.group}'"
            f"{suggestion(entry.group, groups) or '; expected one of ' + ', '.join(groups)}",
        )
        for entry in (*unknown, *discover().misnamed)
    ]


@dataclass(frozen=True)
class PartOf:
    """Marks a field made by `Part`, so that the JSON schema contains the ``kind`` of the part, e.g. ``"rewards"``."""

    kind: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {KIND: self.kind}


def Part(kind: str) -> Any:  # noqa: N802
    """Returns the type annotation of a config field that holds the config of a part.

    For example, the field ``inner: Part("rewards")`` accepts what `Registry.validate` of the rewards accepts. ``kind``
    is a key of `REGISTRIES`.
    """

    def validate(value: Any) -> PartConfig:
        try:
            return REGISTRIES[kind]._validate(value)  # the size was checked with the outer config
        except ConfigError as error:
            raise nested(error.errors) from error

    # SerializeAsAny: otherwise a dump only contains the fields of PartConfig
    return Annotated[SerializeAsAny[PartConfig], BeforeValidator(validate), PartOf(kind)]


encoders = Registry(
    "encoders",
    config="longalign.encoders.config:EncoderConfig",
    bases=["longalign.encoders.base:Encoder"],
)
rewards = Registry(
    "rewards",
    config="longalign.rewards.config:RewardConfig",
    bases=["longalign.rewards.base:Reward"],
    function=("images", "prompts"),
)
edits = Registry(
    "edits",
    config="longalign.edits.config:EditConfig",
    bases=["longalign.edits.base:Edit"],
)
trainers = Registry(
    "trainers",
    config="longalign.trainers.config:TrainerConfig",
    bases=["longalign.trainers.base:Trainer"],
)
backbones = Registry(
    "backbones",
    config="longalign.backbones.config:BackboneConfig",
    bases=["longalign.backbones.base:Backbone"],
)
data = Registry(
    "data",
    config="longalign.data.config:DataConfig",
    bases=["longalign.data.base:Data", "longalign.data.stream:Stream"],
)
segmenters = Registry(
    "segmenters",
    config="longalign.segmenters.parts:SegmenterConfig",
    function=("prompt", "count"),
)
gradient_steps = Registry(
    "gradient_steps",
    config="longalign.gradient_steps.config:GradientStepsConfig",
    bases=["longalign.gradient_steps.base:GradientStepSelector"],
)
metrics = Registry(
    "metrics",
    config="longalign.metrics.config:MetricConfig",
    bases=["longalign.metrics.base:Metric"],
    function=("images", "prompts"),
)

REGISTRIES: dict[str, Registry] = {
    r.kind: r for r in (backbones, data, encoders, rewards, edits, gradient_steps, metrics, segmenters, trainers)
}
