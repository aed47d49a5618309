"""Generates JSON schemas of config classes: of one class for ``longalign describe``, of a run's config for editors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from longalign.config.run import RunConfig
from longalign.registry import KIND, MAX_INT, REGISTRIES, PartConfig, PartError
from longalign.trainers.config import TrainerConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = "#/$defs/"


class Generator(GenerateJsonSchema):
    """Generates the JSON schema of a config class with defaults and descriptions of all keys, and without titles."""

    def get_default_value(self, schema: Any) -> Any:
        factory = schema.get("default_factory")
        if factory is None or schema.get("default_factory_takes_data"):
            return super().get_default_value(schema)
        return factory()

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def int_schema(self, schema: Any) -> JsonSchemaValue:
        out = super().int_schema(schema)
        if out.get("maximum") == MAX_INT:
            del out["maximum"]
        return out

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        out, model = super().model_schema(schema), schema["cls"]
        out.pop("title", None)
        out["description"] = "\n\n".join(map(_plain, summary(model).split("\n\n")))
        for key, text in descriptions(model).items():
            if key in out.get("properties", {}):
                out["properties"][key]["description"] = text
        return out

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}  # the type of a plugin's key that JSON has no words for

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Hides pydantic's warning about a default that JSON cannot represent; the schema then has no default."""


class PlainGenerator(Generator):
    """Generates the JSON schema that ``longalign describe`` shows.

    The schema omits the key ``name`` of a part, and short forms of a value, such as one item in place of a list.
    """

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        out = super().model_schema(schema)
        if issubclass(schema["cls"], PartConfig):
            out["properties"].pop("name", None)
        return out

    def function_before_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def model_schema(model: type[BaseModel]) -> JsonSchemaValue:
    """Returns the JSON schema, as a mapping, from which ``longalign describe`` describes a config class.

    ``properties`` has type, default and description of each key, and ``$defs`` the schemas of nested config classes.
    """
    references, schema = models_json_schema([(model, "validation")], schema_generator=PlainGenerator)
    definitions = schema["$defs"]
    name = references[model, "validation"]["$ref"].rpartition("/")[2]  # which need not be that of the class
    return {**definitions[name], "$defs": definitions}


def run_schema() -> JsonSchemaValue:
    """Returns the JSON schema of a run's config for editors, with the keys of all installed parts.

    Parts of plugins that fail to import are omitted. The schema does not check whether the values of different keys fit
    together, so it accepts more configs than `longalign.load_config`.
    """
    parts = {f"{kind}.{name}": (kind, name, model) for kind, name, model in _parts()}
    references, schema = models_json_schema(
        [(model, "validation") for model in dict.fromkeys((RunConfig, *(model for *_, model in parts.values())))],
        schema_generator=Generator,
    )
    definitions: dict[str, Any] = schema["$defs"]

    def definition(model: type[BaseModel]) -> dict[str, Any]:
        return definitions[references[model, "validation"]["$ref"].removeprefix(REFERENCE)]

    named = {key: _named(definition(model), name) for key, (_, name, model) in parts.items()}
    kinds = {
        kind: _any_of({key: named[key] for key, (part_kind, *_) in parts.items() if part_kind == kind})
        for kind in REGISTRIES
    }
    run = {**definition(RunConfig), "allOf": list(_requirements())}
    run["required"] = [key for key in run["required"] if key not in TrainerConfig.needs]
    run["$defs"] = {**definitions, **named, **kinds}
    return {"$schema": DIALECT, "title": "A run of longalign", **_pruned(_resolved(run))}


def summary(model: type) -> str:
    """Returns the text before ``Attributes:`` in a class's own docstring; empty if it has no docstring of its own."""
    return _docstring(model)[0]


def descriptions(model: type) -> dict[str, str]:
    """Returns key -> description for a config class.

    The description is the docstring below the field. If there is none, it is the entry under ``Attributes:`` in the
    docstring of the class, and if there is none either, the description in the base class. Keys without a description
    are omitted.
    """
    out: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel):
            continue
        out |= _docstring(base)[1]
        own = {
            key: base.model_fields[key].description for key in inspect.get_annotations(base) if key in base.model_fields
        }
        out |= {key: _plain(text) for key, text in own.items() if text}
    return {key: out[key] for key in getattr(model, "model_fields", {}) if key in out}


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _docstring(model: type) -> tuple[str, dict[str, str]]:
    """Splits a class's own docstring into the text before ``Attributes:`` and attribute -> description."""
    doc = inspect.cleandoc(model.__doc__ or "") if "__doc__" in vars(model) else ""
    text, _, rest = doc.partition("Attributes:")
    attributes: dict[str, str] = {}
    key = ""
    for line in rest.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            key = match[1]
            attributes[key] = match[2]
        elif line.startswith("        ") and key:
            attributes[key] += " " + line.strip()
        elif line.strip() and not line.startswith(" "):
            break
    return text.replace("``", "`").strip(), {key: _plain(value) for key, value in attributes.items()}


def _parts() -> Iterator[tuple[str, str, type[PartConfig]]]:
    for kind, registry in REGISTRIES.items():
        for name in registry.names():
            try:
                yield kind, name, registry.get(name)
            except PartError:  # `longalign list` names them
                continue


def _named(schema: JsonSchemaValue, name: str) -> JsonSchemaValue:
    """Returns the schema of a part's config with ``name`` as the only allowed value of its required key ``name``."""
    properties = {**schema["properties"], "name": {"const": name, "description": schema["description"]}}
    required = ["name", *(key for key in schema.get("required", ()) if key != "name")]
    return {**schema, "properties": properties, "required": required}


def _any_of(named: dict[str, JsonSchemaValue]) -> JsonSchemaValue:
    """Returns the schema of any part of one kind: a mapping with ``name``, or a name alone if no other key is required.

    ``named`` maps definition names, ``kind.name``, to the schemas of the kind's parts.
    """
    bare = [part["properties"]["name"]["const"] for part in named.values() if part["required"] == ["name"]]
    names = [{"enum": bare}] if bare else []
    return {"anyOf": [*names, *({"$ref": REFERENCE + key} for key in named)]}


def _requirements() -> Iterator[JsonSchemaValue]:
    """Yields a JSON schema each for backbone and encoder: the key is required unless the trainer does not use it."""
    needs = {name: model.needs for _, name, model in _parts() if issubclass(model, TrainerConfig)}
    for key in TrainerConfig.needs:
        names = {"enum": [name for name, needed in needs.items() if key not in needed]}
        trainer = {"anyOf": [names, {"type": "object", "properties": {"name": names}, "required": ["name"]}]}
        yield {"if": {"properties": {"trainer": trainer}, "required": ["trainer"]}, "else": {"required": [key]}}


def _resolved(value: Any) -> Any:
    """Returns a JSON schema in which each key that holds a part refers to the schema of all parts of that kind.

    Such keys are recognized by their entry `longalign.registry.KIND`.
    """
    if isinstance(value, list):
        return [_resolved(item) for item in value]
    if not isinstance(value, dict):
        return value
    out = {key: _resolved(item) for key, item in value.items() if key != KIND}
    return {"$ref": REFERENCE + value[KIND], **out} if KIND in value else out


def _pruned(schema: JsonSchemaValue) -> JsonSchemaValue:
    """Returns a JSON schema without the entries of ``$defs`` that it does not use."""
    used: dict[str, Any] = {}
    pending = list(_references({key: value for key, value in schema.items() if key != "$defs"}))
    while pending:
        name = pending.pop()
        if name not in used:
            used[name] = schema["$defs"][name]
            pending += _references(used[name])
    return {**schema, "$defs": dict(sorted(used.items()))}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference.removeprefix(REFERENCE)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
