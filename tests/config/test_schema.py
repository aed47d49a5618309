"""The JSON schema of a run, for editors, and the descriptions and defaults of keys."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from longalign.backbones.config import BackboneConfig
from longalign.config.describe import describe, describe_part, describe_schema
from longalign.config.parsing import read_mapping
from longalign.config.schema import DIALECT, descriptions, run_schema
from longalign.registry import REGISTRIES, PartError, Section, backbones
from longalign.runtime import examples_folder

EXAMPLES = sorted(examples_folder().glob("*.yaml"))


class Inner(Section):
    """A section.

    Attributes:
        rank: width, as
            the class says.
    """

    rank: int = 32
    scale: float = 1.0
    """factor, as the field says."""


class OuterConfig(BackboneConfig):
    """A part.

    Attributes:
        plain: of the ``Attributes:``.
    """

    target = "tests:Outer"

    name: Literal["outer"] = "outer"
    needed: int
    plain: str = "a"
    instance: Inner = Inner(rank=4)
    mapping: Inner = Field({"rank": 8})  # type: ignore[assignment]
    made: list[int] = Field(default_factory=lambda: [1, 2])
    bounded: int | None = Field(None, ge=1)
    odd: Any = print


class DerivedConfig(OuterConfig):
    """A part with other defaults."""

    name: Literal["derived"] = "derived"
    plain: str = "b"
    bounded: int | None = Field(3, ge=1)
    """of the derived class."""


@pytest.fixture
def outer():
    backbones.register("outer", OuterConfig)
    backbones.register("derived", DerivedConfig)
    yield
    backbones.unregister("outer")
    backbones.unregister("derived")


def test_describe_shows_own_defaults_of_part(outer):
    lines = describe_part("backbones", "outer").splitlines()
    keys = [line for line in lines[4:] if not line.startswith(" ")]
    assert keys == [
        "needed: int (required)",
        'plain: text = "a"',
        "instance: mapping",
        "instance.rank: int = 4",
        "instance.scale: float = 1.0",
        "mapping: mapping",
        "mapping.rank: int = 8",
        "mapping.scale: float = 1.0",
        "made: list of int = [1, 2]",
        "bounded: int >= 1 | null = null",
        "odd: any",
    ]
    assert lines[lines.index("instance.rank: int = 4") + 1] == "    width, as the class says."


def test_descriptions_are_those_of_fields_and_base_classes(outer):
    assert descriptions(Inner) == {"rank": "width, as the class says.", "scale": "factor, as the field says."}
    assert descriptions(OuterConfig) == {"plain": "of the `Attributes:`."}
    assert descriptions(DerivedConfig) == {"plain": "of the `Attributes:`.", "bounded": "of the derived class."}
    assert 'plain: text = "b"\n    of the `Attributes:`.' in describe("derived")


def resolve(schema, node):
    return schema["$defs"][node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else node


def test_run_schema_has_every_part_by_name(outer):
    schema = run_schema()
    assert schema["$schema"] == DIALECT
    for kind, registry in REGISTRIES.items():
        if kind not in schema["$defs"]:
            assert kind == "metrics"  # which no key of a run holds
            continue
        parts = [resolve(schema, member) for member in schema["$defs"][kind]["anyOf"]]
        named = {part["properties"]["name"]["const"]: part for part in parts if "properties" in part}
        assert sorted(named) == list(registry.names())
        for name, part in named.items():
            assert part["properties"].keys() == registry.get(name).model_fields.keys()
            assert part["additionalProperties"] is False
            assert part["required"][0] == "name"
            assert part["description"]
    bare = schema["$defs"]["backbones"]["anyOf"][0].get("enum", [])
    assert "outer" not in bare  # it needs a key
    assert "grouped-random" in schema["$defs"]["gradient_steps"]["anyOf"][0]["enum"]
    outer_schema = schema["$defs"]["backbones.outer"]
    assert outer_schema["required"] == ["name", "needed"]
    assert outer_schema["properties"]["plain"] == {
        "type": "string",
        "default": "a",
        "description": "of the `Attributes:`.",
    }
    lr = schema["$defs"]["LoopConfig"]["properties"]["lr"]
    assert lr["description"] == "learning rate of AdamW, constant after the warmup."


def references(node):
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from references(item)


def test_run_schema_refers_to_its_own_definitions():
    schema = run_schema()
    assert {reference.removeprefix("#/$defs/") for reference in references(schema)} == set(schema["$defs"])


def test_run_schema_is_valid():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(run_schema())


@pytest.fixture(scope="module")
def problems():
    """Function that returns the paths of a config that the schema rejects."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(run_schema())
    return lambda config: [".".join(map(str, error.absolute_path)) for error in validator.iter_errors(config)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_run_schema_accepts_examples(path, problems):
    assert problems(read_mapping(Path(path))) == []


SD = {"name": "sd", "checkpoint": "mini/sd"}
RUN = {"backbone": SD, "encoder": "t5"}


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (RUN, []),
        ({**RUN, "loop": {"trackers": "wandb"}}, []),
        ({**RUN, "data": {"name": "webdataset", "shards": "a.tar"}}, []),
        ({"trainer": "denscore", "data": "scene-pairs"}, []),
        ({"encoder": "t5"}, [""]),
        ({"trainer": {"name": "align"}, "encoder": "t5"}, [""]),
        ({**RUN, "encoder": "t6"}, ["encoder"]),
        ({**RUN, "backbone": "sd"}, ["backbone"]),
        ({**RUN, "backbone": {**SD, "checkpont": "x"}}, ["backbone"]),
        ({**RUN, "encoder": {"name": "clip-segment", "segmenter": {"name": "packed", "n": 0}}}, ["encoder"]),
        ({**RUN, "loop": {"lr": -1}}, ["loop.lr"]),
        ({**RUN, "lop": {}}, [""]),
    ],
)
def test_run_schema_rejects_what_load_config_rejects(config, paths, problems):
    assert problems(config) == paths


def test_json_schema_is_of_a_run():
    with pytest.raises(PartError, match="longalign describe run, got encoders t5"):
        describe_schema(["encoders", "t5"])


def test_describe_without_words_lists_all_kinds():
    rows = [line for line in describe().splitlines()[1:] if line[:1].strip()]
    assert {row.split()[0] for row in rows} == set(REGISTRIES)
