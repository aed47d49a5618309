"""Who may import whom, read from the source; and the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import longalign

ROOT = Path(longalign.__file__).parent
KINDS = ("backbones", "data", "encoders", "rewards", "gradient_steps", "trainers")

# A module imports from lower levels only. Modules that are not listed are concrete parts, or the helpers of such.
PART = 4
LEVELS = {
    0: "runtime errors discovery files hub registry segment data.lines",
    1: "config checks describe environment backbones.configs data.configs encoders.configs "
    "rewards.configs gradient_steps.configs trainers.configs",
    2: "preference diffusion rollout images image_io table record mini store fingerprint sharding weights locks tokens",
    3: "backbones.base backbones.lora data.base data.image_dataset data.stream encoders.base rewards.base "
    "rewards.guard gradient_steps.base trainers.base",
    5: "checkpoint conditioning charts caching",
    6: "compose",
    7: "pipeline evaluate report convert publish",
    8: "trainers.loop trainers.resume trainers.validation baselines",
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
    "diffusers": ("backbones", "pipeline", "baselines"),
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


# In an installed package the examples are inside.
MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if "examples" not in path.relative_to(ROOT).parts}


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


def wrong(modules, offends, imports=own_imports):
    """``module imports another`` for each import of the modules that a rule does not allow."""
    return [
        f"{module} imports {imported}" + (" inside a function" if inside else "")
        for module in modules
        for imported, inside in sorted(imports(MODULES[module]))
        if offends(module, imported, inside)
    ]


def upwards(module, imported, inside):
    kind = module.split(".")[0]
    if (module, imported) in UPWARDS or (inside and module == f"{kind}.configs" and imported.startswith(kind)):
        return not inside
    own, other = level(module), level(imported)
    return not (other < own or (own == other and (own < PART or imported.startswith(f"{kind}."))))


def test_modules_import_from_lower_levels():
    assert not wrong([m for m in MODULES if m != "__init__"], upwards)


def test_a_part_imports_no_concrete_part_of_another_kind():
    """It takes them from the registry, or as arguments."""

    def offends(module, imported, inside):
        other, _, name = imported.partition(".")
        return other in KINDS and other != module.split(".")[0] and bool(name) and name not in SHARED

    assert not wrong([m for m in MODULES if m.split(".")[0] in KINDS and m != "trainers.loop"], offends)


def test_tensor_maths_imports_nothing_of_ours():
    assert not wrong(["preference", "diffusion", "images"], lambda module, imported, inside: True)


def test_light_modules_import_nothing_heavy():
    light = [m for m in MODULES if within(m, NO_TORCH)]
    assert not wrong(light, lambda module, imported, inside: not inside and within(imported, HEAVY), imports_of)


def test_libraries_stay_where_they_belong():
    def offends(module, imported, inside):
        rules = [places for library, places in ONLY_IN.items() if within(imported, [library])]
        return bool(rules) and not any(within(module, places) for places in rules)

    assert not wrong(MODULES, offends, imports_of)


def test_a_trainer_does_not_look_anything_up():
    trainers = [m for m in MODULES if m.startswith("trainers.") and m != "trainers.configs"]
    assert not [m for m in trainers if "registry" in MODULES[m].read_text(encoding="utf-8")]


def test_offenders_are_named():
    assert wrong(["diffusion"], lambda *about: True, lambda path: {("torch", False), ("peft", True)}) == [
        "diffusion imports peft inside a function",
        "diffusion imports torch",
    ]
    assert upwards("registry", "config", False) and not upwards("config", "registry", False)
    assert not upwards("compose", "trainers.loop", True) and upwards("compose", "trainers.loop", False)


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
