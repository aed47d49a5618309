"""Import rules between modules, checked on the source; and the public names."""

import ast
import pkgutil
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import longalign
from longalign.registry import REGISTRIES

ROOT = Path(longalign.__file__).parent
KINDS = ("backbones", "data", "edits", "encoders", "rewards", "gradient_steps", "metrics", "trainers")

# A module imports from lower levels only. Unlisted modules are concrete parts, or helpers of parts.
PART = 4
LEVELS = {
    0: "lazy runtime errors discovery hub names parts registry segmenters files.paths files.lines "
    "data.prompts.formats data.prompts.sets data.images.shards config.solvers sizes",
    1: "config checkpoints.redaction checkpoints.provenance vlm.config",  # and the configs of all kinds
    2: "functional image_io files mini sharding tokens "
    "evaluation.record evaluation.bootstrap evaluation.groups encoders.bucketing encoders.counting vlm",
    3: "backbones.base backbones.flops backbones.graphs backbones.lora backbones.lora_layers data.base "
    "data.images.base data.stream image_folder encoders.base rewards.base "
    "rewards.guard directions edits.base gradient_steps.base metrics.base trainers.base",
    5: "checkpoints.checkpoint inference.diffusers inference.inputs inference.pipelines inference.schedulers "
    "evaluation.formatting evaluation.table evaluation.charts caching",
    6: "compose",
    7: "inference.sampling evaluation checkpoints",
    8: "loop inference.baselines",
    9: "ablation demo diagnostics model testing",
    10: "cli",
    11: "__main__",
}
# Modules of a kind that modules of other kinds may import.
SHARED = ("base", "config", "bucketing", "guard", "lines", "stream")

NO_TORCH = (
    *("__init__", "__main__", "cli", "compose", "diagnostics", "loop.fit"),
    *("ablation.run", "ablation.cells", "ablation.worker"),
    *f"{LEVELS[0]} {LEVELS[1]}".split(),
)
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
    "transformers": ("encoders", "rewards", "mini", "testing", "vlm"),
    "open_clip": ("encoders", "rewards", "mini", "testing"),
    "diffusers": ("backbones", "inference", "testing"),
    "diffusers.training_utils": ("backbones", "inference", "loop.optimization"),
    "peft": ("backbones",),
    "accelerate": ("loop",),
    "catalogue": ("registry",),
    "longalign.parts": ("registry",),  # which guards against unreadable distributions
    "longalign_dpo": (),
    "longalign_grpo": (),
    "longalign_siglip": (),
    "longalign_ella": (),
    "longalign_prism": (),
}


def within(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


# An installed package contains the examples.
MODULES = {
    name_of(path): path
    for path in sorted(ROOT.rglob("*.py"))
    if not {"examples", "plugin"} & set(path.relative_to(ROOT).parts)  # templates of plugins
}


def imports_of(path, typing=False):
    """``(imported module, whether inside a function)``; with ``typing``, also imports under TYPE_CHECKING."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}, line {child.lineno}: imports are absolute"
                yield child.module, inside
                yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
            yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def package_imports(path, typing=False):
    """Imported modules of longalign."""
    names = {(name.removeprefix("longalign."), inside) for name, inside in imports_of(path, typing)}
    return {(name, inside) for name, inside in names if name in MODULES and name != "__init__"}


def is_config(module):
    return module.split(".")[0] in KINDS and module.split(".")[-1] == "config"


def level(module):
    if MODULES[module].name == "__init__.py":  # imports nothing, or only lazily
        return 0
    if is_config(module):
        return 1
    for number, names in LEVELS.items():
        if within(module, names.split()):
            return number
    assert module.split(".")[0] in KINDS, f"{module} has no level; give it one in this test and in the design"
    return PART


def violations(modules, is_violation, imports=package_imports):
    """One message for each import that violates a rule."""
    return [
        f"{module} imports {imported}" + (" inside a function" if inside else "")
        for module in modules
        for imported, inside in sorted(imports(MODULES[module]))
        if is_violation(module, imported, inside)
    ]


def upwards(module, imported, inside):
    kind = module.split(".")[0]
    if inside and is_config(module) and imported.startswith(kind):
        return not inside
    importer_level, imported_level = level(module), level(imported)
    same_level_allowed = importer_level < PART or imported.startswith(f"{kind}.")
    return not (imported_level < importer_level or (importer_level == imported_level and same_level_allowed))


def test_imports_have_no_circle():
    """Neither imports inside functions nor those for types lead back; packages only name their modules."""
    modules = {name: path for name, path in MODULES.items() if path.name != "__init__.py"}
    graph = {
        name: {m for m, _ in package_imports(path, typing=True)} & modules.keys() for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_modules_import_from_lower_levels():
    assert not violations([m for m in MODULES if m != "__init__"], upwards)


def test_parts_import_no_parts_of_other_kinds():
    """Parts get other parts from the registry, or as arguments."""

    def is_violation(module, imported, inside):
        kind, _, name = imported.partition(".")
        return kind in KINDS and kind != module.split(".")[0] and bool(name) and name.split(".")[-1] not in SHARED

    assert not violations([m for m in MODULES if m.split(".")[0] in KINDS], is_violation)


def test_tensor_maths_imports_no_longalign_modules():
    assert not violations(
        [f"functional.{m}" for m in ("preference", "diffusion", "images")], lambda module, imported, inside: True
    )


def test_light_modules_import_no_heavy_libraries():
    light = [m for m in MODULES if within(m, NO_TORCH)]
    assert not violations(light, lambda module, imported, inside: not inside and within(imported, HEAVY), imports_of)


def test_libraries_are_imported_only_where_allowed():
    def is_violation(module, imported, inside):
        rules = [packages for library, packages in ONLY_IN.items() if within(imported, [library])]
        return bool(rules) and not any(within(module, packages) for packages in rules)

    assert not violations(MODULES, is_violation, imports_of)


def test_trainers_build_no_parts_of_a_run():
    trainers = [MODULES[m].read_text(encoding="utf-8") for m in MODULES if m.startswith("trainers.")]
    kinds = {kind for text in trainers for kind in re.findall(r"registry\.(\w+)\.construct", text)}
    assert kinds == {"gradient_steps"} and not any("REGISTRIES" in text for text in trainers)


def test_violations_name_both_modules():
    assert violations(["functional.diffusion"], lambda *_: True, lambda path: {("torch", False), ("peft", True)}) == [
        "functional.diffusion imports peft inside a function",
        "functional.diffusion imports torch",
    ]
    assert upwards("registry", "config.run", False) and not upwards("config.run", "registry", False)
    assert upwards("compose", "loop.run", True) and not upwards("loop.run", "compose", False)


def test_imports_of_finds_nested_imports(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nif TYPE_CHECKING:\n    import peft\n"
        "class A:\n    def f(self):\n        from longalign.rewards import base\n"
    )
    imports = set(imports_of(path))
    assert ("torch", False) in imports
    assert ("longalign.rewards.base", True) in imports
    assert not any(name == "peft" for name, _ in imports)
    assert package_imports(path) == {("rewards", True), ("rewards.base", True)}


def test_public_names_exist_and_are_listed():
    for name in longalign.__all__:
        assert getattr(longalign, name).__name__ == name
    assert set(longalign.__all__) <= set(dir(longalign))
    assert {"build_from_config", "load_config", "override", "diff", "condition"} <= set(longalign.__all__)
    assert longalign.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match=r"'longalign' .*'nothing'"):
        _ = longalign.nothing


@pytest.mark.parametrize(
    "package", ["backbones", "directions", "edits", "functional", "gradient_steps", "metrics", "mini", "rewards"]
)
def test_packages_export_their_names_lazily(package):
    module = import_module(f"longalign.{package}")
    assert {getattr(module, name).__name__ for name in module.__all__} == set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=rf"'longalign\.{package}' .*'nothing'"):
        _ = module.nothing
    code = f"import sys, longalign.{package} as m; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "package", ["checkpoints", "data", "encoders", "evaluation", "inference", "testing", "trainers"]
)
def test_lazily_exported_names_exist(package):
    module = import_module(f"longalign.{package}")
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_kind_exports_classes_of_its_parts(kind):
    module, registry = import_module(f"longalign.{kind}"), REGISTRIES[kind]
    builtin = [name for name in registry.names() if registry.info(name).owner.startswith("longalign ")]
    configs = [registry.get(name) for name in builtin]
    classes = [pkgutil.resolve_name(config.target) for config in configs]
    missing = [item.__name__ for item in (*configs, *classes) if getattr(module, item.__name__, None) is not item]
    assert configs and not missing


def test_import_longalign_imports_no_heavy_libraries():
    code = (
        "import sys, longalign\n"
        "assert 'pydantic' not in sys.modules\n"
        "from longalign import load_config, override, diff, build_from_config, ConfigError\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not (ROOT.parent / "benchmarks").is_dir(), reason="the installed package has no scripts")
def test_scripts_import(monkeypatch):
    """Benchmarks and recipes are not part of the package, so type checks and other tests do not read them."""
    root = ROOT.parent
    folders = [root / "benchmarks", root / "recipes", root / "recipes" / "mini"]
    names = [file.stem for folder in folders for file in folder.glob("*.py") if file.stem != "__main__"]
    assert len(names) == len({*names}) and not {*names} & {*sys.modules}
    monkeypatch.setattr(sys, "argv", ["script"])  # read by some at import
    monkeypatch.setattr(sys, "path", [*map(str, folders), *sys.path])
    try:
        for name in names:
            assert Path(import_module(name).__file__).parent in folders
    finally:
        for name in names:
            sys.modules.pop(name, None)
