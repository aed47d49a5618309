"""Who may import whom, read from the source; and the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import longalign

ROOT = Path(longalign.__file__).parent
KINDS = ("backbones", "data", "encoders", "rewards", "schedules", "trainers")

# A module imports from lower levels only. Modules that are not listed are concrete parts, or the helpers of such.
PART = 4
LEVELS = {
    0: "runtime faults discovery files registry segment data.lines",
    1: "config describe backbones.configs data.configs encoders.configs rewards.configs schedules.configs "
    "trainers.configs",
    2: "preference diffusion rollout images imagefiles table record mini store fingerprint sharding",
    3: "backbones.base backbones.lora data.base data.pictures data.stream encoders.base rewards.base rewards.guard "
    "schedules.base trainers.base",
    5: "checkpoint conditioning charts caching",
    6: "compose",
    7: "pipeline evaluate report convert publish",
    8: "trainers.loop trainers.validation stock",
    9: "demo model",
    10: "commands",
    11: "cli",
    12: "__main__",
}
# What is imported inside a function and stands higher, because a config or a composition makes it.
UPWARDS = {("compose", "trainers.loop")}
# What modules of another kind may import of a kind.
SHARED = ("base", "configs", "guard", "lines", "stream")

NO_TORCH = ("__init__", "__main__", "cli", "commands", "compose", *f"{LEVELS[0]} {LEVELS[1]}".split())
HEAVY = (
    "torch",
    "numpy",
    "PIL",
    "einops",
    "transformers",
    "diffusers",
    "open_clip",
    "accelerate",
    "peft",
    "safetensors",
)

ONLY_IN = {
    "transformers": ("encoders", "rewards", "mini"),
    "open_clip": ("encoders", "rewards", "mini"),
    "diffusers": ("backbones", "pipeline", "stock"),
    "diffusers.training_utils": ("backbones", "pipeline", "trainers.loop"),
    "peft": ("backbones",),
    "accelerate": ("trainers.loop",),
    "catalogue": ("registry",),
    "longalign_siglip": (),
}


def within(module, places):
    return any(module == place or module.startswith(f"{place}.") for place in places)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(path):
    """``(imported module, whether inside a function)``, without what only type checkers import."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}, line {child.lineno}: imports are absolute"
                yield child.module, inside
                yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
            yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def own_imports(path):
    """The imported modules of ours."""
    names = {(name.removeprefix("longalign."), inside) for name, inside in imports_of(path)}
    return {(name, inside) for name, inside in names if name in MODULES and name != "__init__"}


def level(module):
    for number, names in LEVELS.items():
        if within(module, names.split()):
            return number
    if module in KINDS:
        return 0
    assert module.split(".")[0] in KINDS, f"{module} has no level; give it one in this test and in the design"
    return PART


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_modules_import_from_lower_levels(module):
    kind = module.split(".")[0]
    for imported, inside in own_imports(MODULES[module]):
        if (module, imported) in UPWARDS or (inside and module == f"{kind}.configs" and imported.startswith(kind)):
            assert inside, f"{module} must import {imported} inside a function"
            continue
        same = level(imported) == level(module) and (level(module) in (0, 1, 2, 3) or imported.startswith(f"{kind}."))
        assert level(imported) < level(module) or same, f"{module} (level {level(module)}) imports {imported}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in KINDS and m != "trainers.loop"])
def test_a_part_imports_no_concrete_part_of_another_kind(module):
    kind = module.split(".")[0]
    for imported, _ in own_imports(MODULES[module]):
        other, _, name = imported.partition(".")
        if other in KINDS and other != kind and name:
            assert name in SHARED, f"{module} imports {imported}; take it from the registry, or as an argument"


@pytest.mark.parametrize("module", ["preference", "diffusion", "images"])
def test_tensor_maths_imports_nothing_of_ours(module):
    assert not own_imports(MODULES[module])


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, NO_TORCH)])
def test_light_modules_import_nothing_heavy(module):
    for imported, inside in imports_of(MODULES[module]):
        assert inside or not within(imported, HEAVY), f"{module} imports {imported} when it is imported"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_where_they_belong(module):
    for imported, _ in imports_of(MODULES[module]):
        rules = [places for library, places in ONLY_IN.items() if within(imported, [library])]
        assert not rules or any(within(module, places) for places in rules), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("trainers.") and m != "trainers.configs"])
def test_a_trainer_does_not_look_anything_up(module):
    assert "registry" not in MODULES[module].read_text(encoding="utf-8")


def test_the_rules_see_imports(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nif TYPE_CHECKING:\n    import peft\n"
        "class A:\n    def f(self):\n        from longalign.rewards import base\n"
    )
    found = set(imports_of(path))
    assert ("torch", False) in found
    assert ("longalign.rewards.base", True) in found
    assert not any(name == "peft" for name, _ in found)
    assert own_imports(path) == {("rewards", True), ("rewards.base", True)}


def test_the_public_names_are_all_there_and_listed():
    for name in longalign.__all__:
        assert getattr(longalign, name).__name__ == name
    assert set(longalign.__all__) <= set(dir(longalign))
    assert {"build_from_config", "load_config", "override", "diff", "condition"} <= set(longalign.__all__)
    assert longalign.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = longalign.nothing


def test_importing_longalign_and_its_config_names_imports_nothing_heavy():
    code = (
        "import sys, longalign\n"
        "assert 'pydantic' not in sys.modules\n"
        "from longalign import load_config, override, diff, build_from_config, ConfigError\n"
        f"found = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not found, found"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
