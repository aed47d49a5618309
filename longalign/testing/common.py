"""Functions shared by all conformance checks: running checks, comparing values, checking the config of a part."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from longalign.config.describe import describe_part
from longalign.config.schema import descriptions
from longalign.errors import ConfigError
from longalign.registry import REGISTRIES, PartConfig
from longalign.runtime import Runtime

#: a check, which fails if it raises
Check = Callable[[], None]
Config = TypeVar("Config", bound=PartConfig)

#: one process on the CPU, with float32
CPU = Runtime()
#: prompts of 7 and of more than 1000 words, and one with emoji, quotation marks and a line break
SHORT = "A red fox sleeps on a wall."
LONG = " ".join(f"Behind the fox stands house number {i}, which is painted blue." for i in range(120))
EMOJI = "A 🦊 sleeps — “quietly” — under a 日本 sign.\nThe sky is gr\u00fcn."


def run_checks(kind: str, config: Any, checks: Iterable[Check]) -> None:
    """Runs checks and raises one AssertionError that lists the failed ones.

    Args:
        kind: kind of the part, e.g. ``"rewards"``, for the message.
        config: config of the part, for the message.
        checks: functions without arguments; a check fails if it raises an exception.

    Raises:
        AssertionError: with name, exception type and message of each failed check.
    """
    failures = []
    for check in checks:
        try:
            check()
        except Exception as error:
            failures.append((check.__name__, error))
    if failures:
        lines = "\n".join(f"  {name}: {type(error).__name__}: {error}" for name, error in failures)
        raise AssertionError(f"{config!r} of kind '{kind}' fails {len(failures)} checks:\n{lines}") from failures[0][1]


def expect(condition: bool, message: str) -> None:
    """Raises AssertionError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


def expect_close(name: str, got: Tensor, expected: Tensor, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    """Raises AssertionError unless two tensors have one shape and differ by at most ``atol + rtol |expected|``.

    ``name`` says in the message what is compared.
    """
    expect(got.shape == expected.shape, f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    if not torch.allclose(got.float(), expected.float(), rtol=rtol, atol=atol):
        difference = float((got.float() - expected.float()).abs().max())
        raise AssertionError(
            f"{name}: differs by up to {difference:.3g}; expected at most {atol:g} + {rtol:g} relative"
        )


def expect_error(name: str, call: Callable[[], Any]) -> None:
    """Raises AssertionError unless ``call()`` raises a ValueError; ``name`` says in the message what is called."""
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{name}: nothing was raised; raise a ValueError")


def checked_config(kind: str, config: Any, base: type[Config]) -> Config:
    """Returns the validated config of a part.

    Args:
        kind: kind of the part, e.g. ``"rewards"``.
        config: name, mapping or config of the part.
        base: base class of the configs of this kind.

    Raises:
        AssertionError: if the config's class does not derive from ``base``.
        ConfigError: if the config is invalid.
    """
    checked = REGISTRIES[kind].validate(config)
    if not isinstance(checked, base):
        raise AssertionError(f"the config {type(checked).__name__} must derive from {base.__module__}.{base.__name__}")
    return checked


def config_checks(kind: str, config: PartConfig) -> list[Check]:
    """Returns the checks of a part's config, for `run_checks`.

    They check that ``longalign list`` and ``longalign describe`` show the part, that each key has a description, that
    importing the config imports no torch, that writing it as JSON and reading it changes nothing, and that an unknown
    key is rejected.
    """
    registry, name = REGISTRIES[kind], config.name

    def is_listed() -> None:
        expect(name in registry.names(), f"'{name}' is not registered; `longalign list {kind}` does not show it")

    def is_described() -> None:
        text = describe_part(kind, name)
        missing = [key for key in type(config).model_fields if key != "name" and f"{key}:" not in text]
        expect(not missing, f"`longalign describe {kind} {name}` does not show {missing}")
        if not _has_source(type(config)):
            return  # docstrings of fields are read from the source
        about = descriptions(type(config))
        bare = [key for key in type(config).model_fields if key != "name" and not about.get(key)]
        expect(not bare, f"the keys {bare} have no description; write a docstring below each field")

    def imports_no_torch() -> None:
        module = type(config).__module__
        if registry.info(name).owner == "this process":
            return  # registered in code, e.g. in a test, where torch is imported already
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        expect(
            result.returncode == 0,
            f"importing {module} imports torch or fails; import torch inside functions: {result.stderr.strip()[-300:]}",
        )

    def survives_json() -> None:
        dumped = json.loads(json.dumps(config.model_dump(mode="json")))
        expect(registry.validate(dumped) == config, "the config differs after it was written as JSON and read again")

    def rejects_unknown_keys() -> None:
        values: Mapping[str, Any] = {**config.model_dump(), "no_such_key": 1}
        try:
            registry.validate(values)
        except ConfigError as error:
            expect("no_such_key" in str(error), f"the error does not name the unknown key: {error}")
        else:
            raise AssertionError("the config accepts an unknown key; keep extra='forbid' in its model_config")

    return [is_listed, is_described, imports_no_torch, survives_json, rejects_unknown_keys]


def _has_source(model: type) -> bool:
    try:
        inspect.getsource(model)
    except (OSError, TypeError):
        return False
    return True
