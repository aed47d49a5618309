"""pyproject.toml matches the package's files and classes."""

import pkgutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_pyproject_lists_all_packages():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "longalign").rglob("__init__.py")}
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(packages | {"longalign.examples"})


def test_repository_has_no_symlinks():
    """Copies, zip files and Windows do not preserve symlinks."""
    folders = ("longalign", "examples", "tests", "docs", "plugins", "recipes", "benchmarks")
    assert not [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("kind", sorted(SETTINGS["project"]["entry-points"]))
def test_entry_points_resolve_to_their_names(kind):
    for name, target in SETTINGS["project"]["entry-points"][kind].items():
        assert pkgutil.resolve_name(target).model_fields["name"].default == name
