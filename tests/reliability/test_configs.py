"""Configs of every kind of nonsense: what reads them ends in a config or in `ConfigError`, in bounded time.

The long forms run by `pytest tests/reliability/test_configs.py -m reliability`, a short form of each with all tests.
"""

import signal
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longalign.config import load_config, override, to_dict, to_yaml
from longalign.errors import ConfigError
from longalign.files import parse_assignments
from longalign.registry import REGISTRIES

SECONDS = 10

SD = {"name": "sd", "checkpoint": "mini/sd"}
CLIP = {"name": "clip-segment", "checkpoint": "mini/sd", "segmenter": {"name": "packed"}}
BASES = [
    to_dict(load_config(source))
    for source in (
        {"backbone": SD, "encoder": CLIP, "trainer": "align", "data": "scenes"},
        {
            "backbone": SD,
            "encoder": {"name": "concat", "parts": [CLIP, {"name": "t5", "adapter": {"checkpoint": "x/y"}}]},
            "rewards": [
                {"name": "reweighted", "inner": "denscore"},
                {"name": "sum", "terms": [{"reward": "hpsv2", "weight": -1}]},
            ],
            "trainer": {"name": "reward", "gradient_steps": {"name": "last", "k": 2}},
            "data": {"name": "prompts", "file": "prompts.txt"},
            "validation": {"prompts": ["a", "b"]},
            "cache": {"folder": "cache"},
        },
        {"rewards": ["denscore"], "trainer": "denscore", "data": "scene-pairs"},
    )
]
NAMES = sorted({name for registry in REGISTRIES.values() for name in registry.names()})

texts = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates too
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, 2**63, 0, -1, 1e400, float("nan"), 1.5, 5e-324]),
    st.just(None).map(lambda _: -(10**5000)),
    st.floats(),
    texts,
    st.binary(max_size=4),
    st.sampled_from(["", ".", "5", "²", "٣", "1e-4", "true", "null", *NAMES]),
)
keys = st.one_of(texts, st.sampled_from(["name", "parts", "inner", "loop", "steps"]), st.integers(), st.none())
values = st.one_of(
    scalars,
    st.sampled_from(NAMES).map(lambda name: {"name": name}),
    st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=8),
)


def places(tree, path=()):
    """The path of everything in a tree."""
    yield path
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


PATHS = [[path for path in places(base) if path] for base in BASES]
sources = st.sampled_from(range(len(BASES)))


def copied(tree):
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def change(tree, path, kind, value):
    """One mutation of a tree, where the path is still there."""
    holder = tree
    for key in path[:-1]:
        if not isinstance(holder, (dict, list)) or (isinstance(holder, dict) and key not in holder):
            return
        if isinstance(holder, list) and not (isinstance(key, int) and key < len(holder)):
            return
        holder = holder[key]
    last = path[-1]
    if (isinstance(holder, dict) and last in holder) or (
        isinstance(holder, list) and isinstance(last, int) and last < len(holder)
    ):
        if kind == "replace":
            holder[last] = value
        elif kind == "remove":
            del holder[last]
        elif kind == "list":
            holder[last] = [holder[last], holder[last]]
        elif kind == "itself":
            holder[last] = tree
        elif isinstance(holder, dict):
            holder[value if isinstance(value, str) else "more"] = value


@contextmanager
def limited():
    """Inside, an endless case is an error."""

    def late(*_):
        raise AssertionError(f"took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_well(read, folder=None):
    """Whether a config was read; a rejected one has its faults by path, an accepted one survives dump and load."""
    with limited():
        try:
            config = read()
        except ConfigError as error:
            assert error.errors
            assert all(isinstance(path, str) and isinstance(message, str) for path, message in error.errors)
            assert len(str(error)) < 50_000
            return False
        assert load_config(to_dict(config)) == config
        if folder is not None:
            (folder / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
            assert load_config(folder / "again.yaml") == config
        return True


def run(count, test, **strategies):
    limits = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    limits(given(**strategies)(test))()


def sizes(short, long):
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.reliability)])


kinds = st.sampled_from(["replace", "remove", "list", "itself", "add"])


@sizes(100, 10_000)
def test_load_config_mutated_mappings(count, tmp_path):
    seen = []

    def test(source, data):
        tree = copied(BASES[source])
        for path, kind, value in data.draw(
            st.lists(st.tuples(st.sampled_from(PATHS[source]), kinds, values), min_size=1, max_size=3)
        ):
            change(tree, path, kind, value)
        seen.append(ends_well(lambda: load_config(tree), tmp_path))

    run(count, test, source=sources, data=st.data())
    assert {True, False} == set(seen)


@sizes(100, 10_000)
def test_override_random_changes(count):
    seen = []

    def test(source, data):
        known = st.sampled_from(PATHS[source]).map(lambda path: ".".join(map(str, path)))
        more = st.tuples(known, st.sampled_from([".", ".0", ".²", ".x", "." + "9" * 5000, "é"])).map("".join)
        paths = st.one_of(known, known, more, texts, st.integers())
        changes = data.draw(st.dictionaries(paths, values, min_size=1, max_size=3))
        seen.append(ends_well(lambda: override(BASES[source], changes)))

    run(count, test, source=sources, data=st.data())
    assert {True, False} == set(seen)


PIECES = ["!!bool x", "!!int ''", "!!set {a}", "&a [*a]", "*a", "<<: ", "? ", ": ", "- ", "[" * 400, "9" * 5000]
PIECES += ["%YAML 1.1", "---", "...", "\t", "\0", "²", "٥", "é", "\ud800", "1_0", "0x1", "1:30", *"{}[]'\"|>#=~@`"]


@sizes(60, 5_000)
def test_parse_assignments_random_text(count):
    def test(source, data):
        path = ".".join(map(str, data.draw(st.sampled_from(PATHS[source]))))
        value = "".join(data.draw(st.lists(st.one_of(st.sampled_from(PIECES), texts), max_size=4)))
        item = data.draw(st.sampled_from([f"{path}={value}", value, f"{path}{value}=1"]))
        ends_well(lambda: override(BASES[source], parse_assignments([item])))

    run(count, test, source=sources, data=st.data())


@sizes(40, 5_000)
def test_load_config_mutated_yaml(count, tmp_path):
    originals = [to_yaml(load_config(base)) for base in BASES]

    def test(source, data):
        text = originals[source]
        pieces = st.one_of(
            st.sampled_from([p for p in PIECES if p != "\ud800"]), st.sampled_from(list(":{}[]&*!,-?\n '\""))
        )
        for where, removed, piece in data.draw(
            st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 5]), pieces), min_size=1, max_size=3)
        ):
            at = int(where * len(text))
            text = text[:at] + piece + text[at + removed :]
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        ends_well(lambda: load_config(tmp_path / "run.yaml"))

    run(count, test, source=sources, data=st.data())


@sizes(60, 10_000)
def test_load_config_mutated_json(count, tmp_path):
    import json

    originals = [json.dumps(base).encode() for base in BASES]

    def test(source, data):
        text = originals[source]
        for where, removed, piece in data.draw(
            st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=3)
        ):
            at = int(where * len(text))
            text = text[:at] + piece + text[at + removed :]
        (tmp_path / "run.json").write_bytes(text)
        ends_well(lambda: load_config(tmp_path / "run.json"))

    run(count, test, source=sources, data=st.data())
