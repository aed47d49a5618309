"""Writes the package of a new plugin from templates, for ``longalign new-plugin``."""

from __future__ import annotations

import re
from importlib import resources
from importlib.metadata import version
from pathlib import Path

#: kinds of parts that a plugin can add: the folder of the templates -> the name of the registry
KINDS = {
    "reward": "rewards",
    "edit": "edits",
    "encoder": "encoders",
    "segmenter": "segmenters",
    "trainer": "trainers",
    "data": "data",
    "backbone": "backbones",
    "metric": "metrics",
    "gradient_steps": "gradient_steps",
}
#: kebab case
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def new_plugin(name: str, kind: str, folder: str | Path = ".") -> Path:
    """Writes the package of a plugin with one part. The part works at once, and passes the test in the package.

    Args:
        name: name of the part in kebab case, e.g. ``"my-reward"``; the package is called ``longalign-<name>``.
        kind: kind of the part, a key or value of `KINDS`, e.g. ``"reward"`` or ``"rewards"``.
        folder: folder in which the folder ``longalign-<name>`` is created.

    Returns:
        The created folder.

    Raises:
        ValueError: if the name is not in kebab case, the kind is unknown, or the folder exists.
    """
    kind = next((template for template, of_registry in KINDS.items() if kind == of_registry), kind)
    if kind not in KINDS:
        raise ValueError(f"expected one of the kinds {', '.join(KINDS)}, got '{kind}'")
    name = name.removeprefix("longalign-")
    if not NAME.fullmatch(name):
        raise ValueError(f"expected a name in kebab case such as 'my-reward', got '{name}'")
    package = f"longalign_{name.replace('-', '_')}"
    target = Path(folder) / f"longalign-{name}"
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or choose a different name or folder")
    major, minor = version("longalign").split(".")[:2]
    words = {
        "MyPart": "".join(word.capitalize() for word in name.split("-")),
        "my-plugin": f"longalign-{name}",
        "my_plugin": package,
        "my-part": name,
        "my_part": name.replace("-", "_"),
        "KINDS": KINDS[kind],
        "KIND": kind.replace("_", " "),
        "VERSION": f"{major}.{minor}",
        "NEXT": f"{major}.{int(minor) + 1}",
    }
    places = {
        "common/project.toml": "pyproject.toml",
        "common/README.md": "README.md",
        "common/test.yml": ".github/workflows/test.yml",
        f"{kind}/config.py": f"{package}/config.py",
        f"{kind}/part.py": f"{package}/part.py",
        f"{kind}/test_conformance.py": "tests/test_conformance.py",
        f"{kind}/example.yaml": "example.yaml",
    }
    templates = resources.files("longalign.testing").joinpath("plugin")
    pattern = re.compile("|".join(words))
    for source, place in places.items():
        text = templates.joinpath(source).read_text(encoding="utf-8")
        path = target / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pattern.sub(lambda match: words[match[0]], text), encoding="utf-8")
    (target / package / "__init__.py").write_text(
        f'"""The {words["KIND"]} `{name}` of longalign."""\n', encoding="utf-8"
    )
    return target
