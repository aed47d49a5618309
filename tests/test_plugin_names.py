"""The names that plugins may import, as listed in docs/plugins.md."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import longalign
from longalign import testing
from longalign.registry import REGISTRIES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(longalign[\w.]*)` \| (.*) \|$", PAGE, re.MULTILINE)
LISTED = {package: re.findall(r"`(\w+)`", names) for package, names in ROWS}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCES = [
    *sorted((ROOT / "plugins").rglob("*.py")),
    *sorted((Path(longalign.__file__).parent / "testing" / "plugin").rglob("*.py")),
    ROOT / "docs" / "plugins.md",
    *sorted((ROOT / "plugins").glob("*/README.md")),
]


def builtin_classes(package):
    """Names of the config and the class of each built-in part that a package of a kind contains."""
    registry = REGISTRIES.get(package.removeprefix("longalign."))
    configs = [registry.get(name) for name in registry.names()] if registry else []
    return {name for c in configs for name in (c.__name__, c.target.partition(":")[2])}


def imported_names(path):
    """``(module, name)`` of each import from longalign in a Python file, or in the Python blocks of a document."""
    text = path.read_text(encoding="utf-8")
    for source in [text] if path.suffix == ".py" else BLOCK.findall(text):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "longalign":
                yield from ((node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "longalign")


def test_listed_packages_include_every_kind():
    assert {f"longalign.{kind}" for kind in REGISTRIES} <= LISTED.keys()


@pytest.mark.parametrize("package", LISTED)
def test_listed_names_are_the_public_names(package):
    public = set(import_module(package).__all__)
    assert set(LISTED[package]) == public - builtin_classes(package)
    assert all(hasattr(import_module(package), name) for name in public)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_plugins_and_templates_import_public_names_only(path):
    private = [
        (module, name)
        for module, name in imported_names(path)
        if module not in LISTED or name not in import_module(module).__all__
    ]
    assert not private


def test_sources_of_plugins_import_longalign():
    assert len({imported for path in SOURCES for imported in imported_names(path)}) > 20


@pytest.mark.parametrize("kind", REGISTRIES)
def test_each_kind_has_a_contract_with_its_check(kind):
    _, found, section = PAGE.partition(f"### `{kind}`\n")
    check = f"check_{kind if kind in ('data', 'gradient_steps') else kind.removesuffix('s')}"
    assert found and f"\n- `{check}`:" in section.partition("\n##")[0]
    assert check in testing.__all__
