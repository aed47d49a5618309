"""Registries of parts, tested with fake distributions in a temporary folder."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from longalign import discovery
from longalign.config.describe import parts_table
from longalign.registry import REGISTRIES, ConfigError, Part, PartConfig, PartError, Registry, encoders, rewards
from longalign.rewards.config import RewardConfig
from longalign.runtime import Runtime

PART_IMPORT = "from longalign.registry import PartConfig"
REWARD_IMPORT = "from longalign.rewards.config import RewardConfig"
GOOD = """
from typing import Literal
from longalign.registry import Part
from longalign.rewards.config import RewardConfig

class BlurConfig(RewardConfig):
    name: Literal["blur"] = "blur"
    radius: float = 1.0

    def build(self, runtime):
        settings = (self.radius, runtime.device)
        return lambda images, prompts: settings
"""


def rewards_of(**parts):
    return "[longalign_rewards]\n" + "".join(f"{name} = {target}\n" for name, target in parts.items())


def test_registry_lists_built_in_entry_points():
    built_in = {name for name in encoders.names() if encoders.info(name).owner.startswith("longalign ")}
    families = {"clip-segment", "clip-segment-sd3", "clip-segment-sdxl"}
    assert built_in == families | {"clip-truncate", "concat", "llm", "longclip", "t5", "t5-flux"}
    assert set(rewards.names()) >= {"clip", "denscore", "hpsv2", "pickscore", "reweighted", "sum"}
    assert {r.kind for r in REGISTRIES.values()} == set(REGISTRIES)
    info = encoders.info("t5")
    assert info.target == "longalign.encoders.t5.config:T5Config"
    assert info.owner.startswith("longalign ")


@pytest.mark.parametrize("kind", REGISTRIES)
def test_registry_loads_every_built_in_part(kind):
    for name in REGISTRIES[kind].names():
        assert issubclass(REGISTRIES[kind].get(name), PartConfig)


def test_registry_builds_plugin_with_its_keys(install):
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
    assert "blur" in rewards
    assert rewards.info("blur").owner == "fake-blur 1.0"
    assert "fake_blur" not in sys.modules, "listing must not import the plugin"
    assert rewards.build({"name": "blur", "radius": 2}, Runtime())([], []) == (2.0, "cpu")
    assert rewards.build("blur", Runtime("meta"))([], []) == (1.0, "meta")


def test_get_imports_only_one_part(install):
    entries = rewards_of(one="fake_one:BlurConfig", two="fake_two:BlurConfig")
    one = GOOD.replace('"blur"', '"one"')
    install("fake-pair", entries, fake_one=one, fake_two=GOOD.replace('"blur"', '"two"'))
    rewards.get("one")
    with pytest.raises(PartError):
        rewards.get("three")
    assert "fake_one" in sys.modules
    assert "fake_two" not in sys.modules


def test_get_unknown_name_suggests_and_lists_names():
    with pytest.raises(PartError, match=r"'denscor' .*'denscore'.* Available: clip, "):
        rewards.get("denscor")
    with pytest.raises(PartError, match=r"'qqq' .*encoders'\. Available: .*t5-flux\.$"):
        encoders.get("qqq")


def test_get_names_broken_plugin_and_its_error(install):
    install("fake-broken", rewards_of(wreck="fake_wreck:X"), fake_wreck="raise ImportError('needs libfoo')")
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
    assert {"blur", "wreck", "clip"} <= set(rewards.names())
    assert rewards.get("blur").__name__ == "BlurConfig"
    with pytest.raises(PartError, match=r"'wreck' .* from fake-broken 1\.0 .*ImportError: needs libfoo"):
        rewards.get("wreck")
    with pytest.raises(PartError, match=r"'blurr' .*'blur'"):
        rewards.get("blurr")


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        ("fake_bad:Missing", "", "AttributeError: .*'Missing'"),
        ("fake_bad:X:Y", "", "'module:attribute'.*'fake_bad:X:Y'"),
        ("fake_bad:X", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("fake_bad:X", "X = 3", "RewardConfig class.*got 3"),
        ("fake_bad:X", "class X: pass", r"RewardConfig class.*got <class 'fake_bad\.X'>"),
        ("fake_bad:BlurConfig", GOOD, r"BlurConfig .*'blur'.*'bad'.*name: Literal\['bad'\] = 'bad'"),
        (
            "fake_bad:X",
            REWARD_IMPORT + "\nclass X(RewardConfig): pass",
            "X needs target",
        ),
        (
            "fake_bad:X",
            PART_IMPORT + "\nclass X(PartConfig): pass",
            "rewards.config.RewardConfig",
        ),
        (
            "fake_bad:X",
            GOOD + "\nclass X(BlurConfig):\n    def build(self): pass",
            r"X\.build .*\(self, runtime\): too many",
        ),
        ("fake_bad:x", "def x(images): pass", r"\(images, prompts\): too many"),
        (
            "fake_bad:X",
            GOOD.replace('"blur"', '"bad"') + "\nclass X(BlurConfig, extra='ignore'): pass",
            "X .*frozen=True and extra='forbid'",
        ),
    ],
)
def test_get_rejects_invalid_part(install, target, text, message):
    install("fake-bad", rewards_of(bad=target), fake_bad=text)
    with pytest.raises(PartError, match=r"from fake-bad 1\.0") as error:
        rewards.get("bad")
    assert re.search(message, str(error.value))


def test_validate_names_failing_config_class(install):
    text = GOOD + "    def model_post_init(self, context):\n        raise KeyError('oops')\n"
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=text)
    with pytest.raises(ConfigError, match=r"fake-blur 1\.0 .*KeyError: 'oops'"):
        rewards.validate("blur")


def test_get_rejects_name_with_two_owners(install):
    for name in ("fake-a", "fake-b"):
        install(name, rewards_of(blur=f"{name.replace('-', '_')}:BlurConfig"), **{name.replace("-", "_"): GOOD})
    with pytest.raises(PartError, match=r"'blur' .*fake-[ab] 1\.0 .* and fake-[ab] 1\.0") as error:
        rewards.get("blur")
    assert "fake-a" in str(error.value)
    assert "fake-b" in str(error.value)
    assert len(rewards.infos("blur")) == 2
    assert rewards.get("clip")


def test_get_rejects_plugin_for_another_version(install, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # the table's last column is cut at the terminal's width
    installed = re.escape(f"longalign {version('longalign')} ")
    install("fake-late", rewards_of(blur="fake_late:BlurConfig"), requires=["longalign>=90.1,<91"], fake_late=GOOD)
    with pytest.raises(PartError, match=rf"fake-late 1\.0 .*longalign[<>=,91.]*>=90\.1.*{installed}") as error:
        rewards.get("blur")
    assert "fake_late" not in sys.modules
    table, problems = parts_table(["rewards"])
    (row,) = [line for line in table.splitlines() if " blur " in line]
    assert re.search(r" fake-late .*broken: .*longalign.*>=90\.1", row)
    assert problems == [str(error.value)]
    with pytest.raises(ConfigError, match=r"name: .*fake-late 1\.0 .*>=90\.1"):
        rewards.validate("blur")


@pytest.mark.parametrize(
    "requirement",
    [
        "longalign",
        "longalign<90,>=0.0.1",
        "Longalign[hf] (>=0.0.1)",
        "longalign>=90; extra == 'test'",
        "longalign>=90; python_version < '3'",
        "longalign-other>=90",
        "longalign>=not.a.version",
    ],
)
def test_get_accepts_plugin_for_this_version(install, requirement):
    install("fake-fit", rewards_of(blur="fake_fit:BlurConfig"), requires=[requirement], fake_fit=GOOD)
    assert rewards.get("blur").__name__ == "BlurConfig"


def test_registry_ignores_stale_copy_of_distribution(install, tmp_path):
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
    (tmp_path / "fake-blur").rename(tmp_path / "stale")
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), version="2.0", fake_blur=GOOD)
    sys.path.append(str(tmp_path / "stale"))
    try:
        assert rewards.info("blur").owner == "fake-blur 2.0"
    finally:
        sys.path.remove(str(tmp_path / "stale"))


def test_registry_skips_malformed_distribution(install):
    install("fake-mangled", "[longalign_rewards]\nno equals sign here\n")
    assert "clip" in rewards
    assert [dist for dist, _ in discovery.discover().malformed] == ["fake-mangled 1.0"]
    with pytest.raises(PartError, match=r"'mangled' .*entry points of fake-mangled 1\.0"):
        rewards.get("mangled")


def test_registry_reads_distributions_without_name(install):
    for name in ("one", "two"):
        install(f"fake-{name}", rewards_of(**{name: f"fake_{name}:BlurConfig"}))
        next(Path(p) for p in sys.path if p.endswith(f"fake-{name}")).joinpath(
            f"fake_{name}-1.0.dist-info/METADATA"
        ).unlink()
    assert {"one", "two"} <= set(rewards.names())


def test_list_reports_unreadable_entry_points(tmp_path):
    """Runs in a subprocess, because catalogue reads all entry points on import."""
    mangled = tmp_path / "fake_mangled-1.0.dist-info"
    mangled.mkdir()
    (mangled / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-mangled\nVersion: 1.0\n")
    (mangled / "entry_points.txt").write_text("[longalign_rewards]\nno equals sign here\n")
    info = tmp_path / "fake_latin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-latin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes("[console_scripts]\nd\u00e9mo = x:y\n".encode("latin-1"))
    path = os.pathsep.join((str(tmp_path), str(Path(discovery.__file__).parents[1])))
    command = [sys.executable, "-m", "longalign", "list", "rewards", "--check"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "longalign.rewards.clip.config:DenscoreConfig" in done.stdout
    assert re.search(r"entry points of fake-latin 1\.0 .*UnicodeDecodeError", done.stderr)
    assert "entry points of fake-mangled 1.0 " in done.stderr
    assert "Traceback" not in done.stderr


def test_misspelt_group_is_reported_with_suggestion(install):
    install("fake-typo", "[longalign_reward]\nblurry = fake_typo:X\n[longalign.encoders]\nother = fake_typo:X\n")
    problems = parts_table()[1]
    pattern = r"fake-typo 1\.0 .*'blurry' .*'longalign_reward'.*'longalign_rewards'"
    assert any(re.search(pattern, problem) for problem in problems)
    assert any("'longalign.encoders'" in problem and "'longalign_encoders'" in problem for problem in problems)
    with pytest.raises(PartError, match=pattern):
        rewards.get("blurry")


def test_parts_table_reports_name_with_two_owners(install):
    for suffix in ("one", "two"):
        install(f"fake-{suffix}", rewards_of(blur=f"fake_{suffix}:BlurConfig"), **{f"fake_{suffix}": GOOD})
    table, problems = parts_table(["rewards"])
    assert table.count(" blur ") == 2
    assert any(re.search(r"'blur' .*fake-\w+ 1\.0 .* and fake-", problem) for problem in problems)


def test_build_rejects_wrong_type_and_wraps_plugin_bugs(install):
    text = GOOD.replace(
        "return lambda images, prompts: settings",
        "return self.radius / 0 if self.radius < 0 else [].x if self.radius > 9 else 3",
    )
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=text)
    with pytest.raises(PartError, match=r"'blur' .*fake-blur 1\.0.*longalign\.rewards\.base\.Reward, got int"):
        rewards.build("blur", Runtime())
    with pytest.raises(PartError, match=r"'blur' .*fake-blur 1\.0.*AttributeError"):
        rewards.build({"name": "blur", "radius": 10}, Runtime())


def test_discover_caches_until_installation(install, monkeypatch):
    reads = []
    real = discovery.distributions
    monkeypatch.setattr(discovery, "distributions", lambda: reads.append(1) or real())
    for _ in range(3):
        rewards.names()
    assert len(reads) <= 1
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
    assert "blur" in rewards.names()


@pytest.fixture
def local():
    """An empty registry of a test kind, emptied again afterwards."""
    registry = Registry("test-kind")
    yield registry
    for name in registry.names():
        registry.unregister(name)


class ThingConfig(PartConfig):
    name: Literal["thing"] = "thing"
    size: int = 1

    def build(self, runtime):
        return self.size


def test_register_and_unregister_in_code(local):
    assert local.register("thing")(ThingConfig) is ThingConfig
    assert local.build({"name": "thing", "size": 3}, Runtime()) == 3
    assert local.info("thing").owner == "this process"
    local.unregister("thing")
    assert "thing" not in local
    with pytest.raises(PartError, match=r"'thing' .*test-kind"):
        local.unregister("thing")


def test_register_plain_function(local):
    def brightness(images, prompts):
        return "scored"

    scoring = Registry("scoring-things", function=("images", "prompts"))
    scoring.register("brightness", brightness)
    assert scoring.build("brightness", Runtime()) is brightness
    assert scoring.info("brightness").target.endswith("brightness")
    with pytest.raises(ConfigError, match=r"size: .*available: name"):
        scoring.validate({"name": "brightness", "size": 1})
    with pytest.raises(PartError, match=r"\(images, prompts\): too many positional"):
        scoring.register("other", lambda images: images)
    with pytest.raises(PartError, match="PartConfig class, got <function"):
        local.register("brightness", brightness)
    scoring.unregister("brightness")


def test_register_replaces_redefined_class_only(local):
    local.register("thing", ThingConfig)
    redefined = type("ThingConfig", (ThingConfig,), {"__module__": __name__, "__qualname__": "ThingConfig"})
    local.register("thing", redefined)
    assert local.get("thing") is redefined
    other = type("OtherConfig", (ThingConfig,), {"__module__": __name__})
    with pytest.raises(PartError, match=r"'thing' .*already .*this process"):
        local.register("thing", other)


def test_register_rejects_built_in_name():
    class MineConfig(RewardConfig):
        target: ClassVar[str] = "nowhere:Mine"

        name: Literal["clip"] = "clip"

    with pytest.raises(PartError, match=r"'clip' of kind 'rewards' is already .* longalign "):
        rewards.register("clip", MineConfig)


@pytest.mark.parametrize("name", ["Thing", "a_b", "a--b", "-a", "a b", ""])
def test_register_rejects_names_not_in_kebab_case(local, name):
    with pytest.raises(PartError, match="kebab case"):
        local.register(name, ThingConfig)


def test_get_names_code_and_entry_point_with_same_name(install):
    class BlurConfig(RewardConfig):
        target: ClassVar[str] = "nowhere:Blur"

        name: Literal["blur"] = "blur"

    rewards.register("blur", BlurConfig)
    try:
        install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
        with pytest.raises(PartError, match=r"this process .* and fake-blur 1\.0"):
            rewards.get("blur")
    finally:
        rewards.unregister("blur")


def test_validate_reports_all_problems_with_paths(local):
    class OuterConfig(PartConfig):
        name: Literal["outer"] = "outer"
        inner: Part("rewards")
        count: int = 1

        def build(self, runtime):
            return self

    local.register("outer", OuterConfig)
    with pytest.raises(ConfigError) as error:
        local.validate({"name": "outer", "inner": {"name": "clip", "chekpoint": "x"}, "count": "many", "cuont": 2})
    problems = dict(error.value.errors)
    assert "'checkpoint'" in problems["inner.chekpoint"]
    assert "'count'" in problems["cuont"]
    assert problems["count"].endswith("got 'many'")
    assert len(problems) == 3


def test_validate_rechecks_config_objects(local):
    local.register("thing", ThingConfig)
    assert local.validate(ThingConfig(size=2)) == ThingConfig(size=2)
    with pytest.raises(ConfigError, match="size"):
        local.validate(ThingConfig().model_copy(update={"size": "large"}))

    class OtherConfig(ThingConfig):
        pass

    with pytest.raises(ConfigError, match=r"'thing' .*ThingConfig.*OtherConfig"):
        local.validate(OtherConfig())


@pytest.mark.parametrize("value", [None, 3, {"checkpoint": "x"}, {"name": 3}, ["clip"]])
def test_validate_rejects_values_without_name(value):
    with pytest.raises(ConfigError, match=r"'name', one of clip, .*got "):
        rewards.validate(value)


def test_validate_rejects_nan(local):
    class RateConfig(PartConfig):
        name: Literal["rate"] = "rate"
        rate: float = 1.0

        def build(self, runtime):
            return self.rate

    local.register("rate", RateConfig)
    with pytest.raises(ConfigError, match="finite"):
        local.validate({"name": "rate", "rate": float("nan")})
