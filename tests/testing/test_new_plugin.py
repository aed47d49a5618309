"""New plugins install, are listed, and pass their own tests."""

import importlib.util
import inspect
import sys
import tomllib
from importlib.metadata import version

import pytest

from longalign.config.run import load_config
from longalign.registry import REGISTRIES
from longalign.testing.new_plugin import KINDS, new_plugin


def name_of(kind):
    return f"fancy-{kind.replace('_', '-')}"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function that writes a plugin and puts it and its metadata on the path."""

    def write(kind):
        folder = new_plugin(name_of(kind), kind, tmp_path)
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        info = folder / f"longalign_{name_of(kind).replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        metadata = ["Metadata-Version: 2.1", f"Name: {project['name']}", "Version: 0.1.0"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
        (info / "METADATA").write_text("\n".join([*metadata, ""]))
        groups = project["entry-points"].items()
        text = "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in parts.items()) for group, parts in groups)
        (info / "entry_points.txt").write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    before = set(sys.modules)
    yield write
    for module in set(sys.modules) - before:
        if module.startswith("longalign_fancy_"):
            del sys.modules[module]


@pytest.mark.parametrize("kind", KINDS)
def test_new_plugin_passes_its_tests(install, tmp_path, kind):
    folder = install(kind)
    assert name_of(kind) in REGISTRIES[KINDS[kind]].names()
    load_config(folder / "example.yaml")
    spec = importlib.util.spec_from_file_location("conformance", folder / "tests" / "test_conformance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [function for name, function in vars(module).items() if name.startswith("test_")]
    assert tests
    for number, function in enumerate(tests):
        given = {"tmp_path": tmp_path / str(number)} if "tmp_path" in inspect.signature(function).parameters else {}
        function(**given)
    leftovers = [path for path in folder.rglob("*.*") if path.is_file() and "my_p" in path.read_text(errors="ignore")]
    assert not leftovers


def test_new_plugin_requires_this_minor_version(tmp_path):
    folder = new_plugin("fancy", "rewards", tmp_path)
    (line, *_) = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"]
    major, minor = map(int, version("longalign").split(".")[:2])
    assert line == f"longalign>={major}.{minor},<{major}.{minor + 1}"


@pytest.mark.parametrize(("name", "kind"), [("Fancy", "reward"), ("fancy", "models"), ("a_b", "data"), ("", "data")])
def test_new_plugin_rejects_names_and_kinds(tmp_path, name, kind):
    with pytest.raises(ValueError, match=r"kebab case|expected one of the kinds"):
        new_plugin(name, kind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_new_plugin_rejects_existing_folder(tmp_path):
    new_plugin("fancy", "data", tmp_path)
    with pytest.raises(ValueError, match="longalign-fancy exists"):
        new_plugin("fancy", "data", tmp_path)
