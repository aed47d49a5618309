"""Random and mutated configs: reading them returns a config or raises `ConfigError`, in bounded time.

`pytest tests/reliability/test_configs.py -m reliability` runs the long forms; the test suite runs short forms.
"""

import signal
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longalign.config.changes import override, parse_assignments
from longalign.config.run import load_config, to_dict, to_yaml
from longalign.errors import ConfigError
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
            "monitor": {"prompts": ["a", "b"]},
            "cache": {"folder": "cache"},
        },
        {"rewards": ["denscore"], "trainer": "denscore", "data": "scene-pairs"},
    )
]
NAMES = sorted({name for registry in REGISTRIES.values() for name in registry.names()})

texts = st.text(st.characters(exclude_categories=()), max_size=12)  # includes lone surrogates
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


def all_paths(tree, path=()):
    """Yields the path of each node of a tree."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from all_paths(value, (*path, key))


PATHS = [[path for path in all_paths(base) if path] for base in BASES]
sources = st.sampled_from(range(len(BASES)))


def copy_tree(tree):
    if isinstance(tree, dict):
        return {key: copy_tree(value) for key, value in tree.items()}
    return [copy_tree(value) for value in tree] if isinstance(tree, list) else tree


def mutate(tree, path, kind, value):
    """Applies one mutation to a tree, if the path still exists."""
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
        elif kind == "cycle":
            holder[last] = tree
        elif isinstance(holder, dict):
            holder[value if isinstance(value, str) else "extra"] = value


@contextmanager
def time_limit():
    """Context manager: fails after `SECONDS`."""

    def fail(*_):
        raise AssertionError(f"took more than {SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def is_accepted(read, folder=None):
    """Reads a config and returns whether it is valid.

    Asserts that a `ConfigError` lists its problems by path, and that a valid config round-trips.
    """
    with time_limit():
        try:
            config = read()
        except ConfigError as error:
            assert error.errors
            assert all(isinstance(path, str) and isinstance(message, str) for path, message in error.errors)
            assert len(str(error)) < 50_000
            return False
        assert load_config(to_dict(config)) == config
        if folder is not None:
            (folder / "copy.yaml").write_text(to_yaml(config), encoding="utf-8")
            assert load_config(folder / "copy.yaml") == config
        return True


def run(count, test, **strategies):
    configure = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    configure(given(**strategies)(test))()


def counts(short, long):
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.reliability)])


kinds = st.sampled_from(["replace", "remove", "list", "cycle", "add"])


@counts(100, 10_000)
def test_load_config_mutated_mappings(count, tmp_path):
    outcomes = []

    def test(source, data):
        tree = copy_tree(BASES[source])
        for path, kind, value in data.draw(
            st.lists(st.tuples(st.sampled_from(PATHS[source]), kinds, values), min_size=1, max_size=3)
        ):
            mutate(tree, path, kind, value)
        outcomes.append(is_accepted(lambda: load_config(tree), tmp_path))

    run(count, test, source=sources, data=st.data())
    assert {True, False} == set(outcomes)


@counts(100, 10_000)
def test_override_random_changes(count):
    outcomes = []

    def test(source, data):
        existing = st.sampled_from(PATHS[source]).map(lambda path: ".".join(map(str, path)))
        extended = st.tuples(existing, st.sampled_from([".", ".0", ".²", ".x", "." + "9" * 5000, "é"])).map("".join)
        paths = st.one_of(existing, existing, extended, texts, st.integers())
        changes = data.draw(st.dictionaries(paths, values, min_size=1, max_size=3))
        outcomes.append(is_accepted(lambda: override(BASES[source], changes)))

    run(count, test, source=sources, data=st.data())
    assert {True, False} == set(outcomes)


PIECES = ["!!bool x", "!!int ''", "!!set {a}", "&a [*a]", "*a", "<<: ", "? ", ": ", "- ", "[" * 400, "9" * 5000]
PIECES += ["%YAML 1.1", "---", "...", "\t", "\0", "²", "٥", "é", "\ud800", "1_0", "0x1", "1:30", *"{}[]'\"|>#=~@`"]


@counts(60, 5_000)
def test_parse_assignments_random_text(count):
    def test(source, data):
        path = ".".join(map(str, data.draw(st.sampled_from(PATHS[source]))))
        value = "".join(data.draw(st.lists(st.one_of(st.sampled_from(PIECES), texts), max_size=4)))
        item = data.draw(st.sampled_from([f"{path}={value}", value, f"{path}{value}=1"]))
        is_accepted(lambda: override(BASES[source], parse_assignments([item])))

    run(count, test, source=sources, data=st.data())


@counts(40, 5_000)
def test_load_config_mutated_yaml(count, tmp_path):
    originals = [to_yaml(load_config(base)) for base in BASES]

    def test(source, data):
        text = originals[source]
        pieces = st.one_of(
            st.sampled_from([p for p in PIECES if p != "\ud800"]), st.sampled_from(list(":{}[]&*!,-?\n '\""))
        )
        for position, removed, piece in data.draw(
            st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 5]), pieces), min_size=1, max_size=3)
        ):
            at = int(position * len(text))
            text = text[:at] + piece + text[at + removed :]
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        is_accepted(lambda: load_config(tmp_path / "run.yaml"))

    run(count, test, source=sources, data=st.data())


@counts(60, 10_000)
def test_load_config_mutated_json(count, tmp_path):
    import json

    originals = [json.dumps(base).encode() for base in BASES]

    def test(source, data):
        text = originals[source]
        for position, removed, piece in data.draw(
            st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=3)
        ):
            at = int(position * len(text))
            text = text[:at] + piece + text[at + removed :]
        (tmp_path / "run.json").write_bytes(text)
        is_accepted(lambda: load_config(tmp_path / "run.json"))

    run(count, test, source=sources, data=st.data())
