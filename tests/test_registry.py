"""Parts by name, with distributions that exist only as metadata in a temporary folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from longalign import discovery
from longalign.describe import list_parts
from longalign.registry import REGISTRIES, ConfigError, Part, PartConfig, PartError, Registry, encoders, rewards
from longalign.runtime import Runtime

GOOD = """
from typing import Literal
from longalign.registry import Part, PartConfig

class BlurConfig(PartConfig):
    name: Literal["blur"] = "blur"
    radius: float = 1.0

    def build(self, runtime):
        made = (self.radius, runtime.device)
        return lambda images, prompts: made
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes a distribution: its metadata, and modules named after it so that no two tests share one."""
    before = set(sys.modules)

    def write(name, entries, version="1.0", **modules):
        site = tmp_path / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entries)
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(str(site))

    yield write
    for module in set(sys.modules) - before:
        if module.startswith("fake_"):
            del sys.modules[module]


def rewards_of(**parts):
    return "[longalign_rewards]\n" + "".join(f"{name} = {target}\n" for name, target in parts.items())


def test_the_built_in_parts_are_those_of_the_entry_points():
    ours = {name for name in encoders.names() if encoders.info(name).owner.startswith("longalign ")}
    families = {"clip-segment", "clip-segment-sd3", "clip-segment-sdxl"}
    assert ours == families | {"clip-truncate", "concat", "longclip", "t5"}
    assert set(rewards.names()) >= {"clip", "denscore", "hpsv2", "pickscore", "reweighted", "sum"}
    assert {r.kind for r in REGISTRIES.values()} == set(REGISTRIES)
    info = encoders.info("t5")
    assert info.target == "longalign.encoders.configs:T5Config"
    assert info.owner.startswith("longalign ")


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_built_in_part_loads_and_calls_itself_by_its_name(kind):
    for name in REGISTRIES[kind].names():
        assert issubclass(REGISTRIES[kind].get(name), PartConfig)


def test_a_plugin_is_found_by_name_and_built_with_its_keys(install):
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
    assert "blur" in rewards
    assert rewards.info("blur").owner == "fake-blur 1.0"
    assert "fake_blur" not in sys.modules, "listing must not import the plugin"
    assert rewards.build({"name": "blur", "radius": 2}, Runtime())([], []) == (2.0, "cpu")
    assert rewards.build("blur", Runtime("meta"))([], []) == (1.0, "meta")


def test_a_lookup_loads_exactly_one_part(install):
    entries = rewards_of(one="fake_one:BlurConfig", two="fake_two:BlurConfig")
    one = GOOD.replace('"blur"', '"one"')
    install("fake-pair", entries, fake_one=one, fake_two=GOOD.replace('"blur"', '"two"'))
    rewards.get("one")
    with pytest.raises(PartError):
        rewards.get("three")
    assert "fake_one" in sys.modules
    assert "fake_two" not in sys.modules


def test_a_miss_says_what_was_meant_and_what_there_is():
    with pytest.raises(PartError, match=r"no part 'denscor' .*; did you mean 'denscore'\? There is: clip, "):
        rewards.get("denscor")
    with pytest.raises(PartError, match=r"no part 'qqq' among encoders\. There is: .*t5\.$"):
        encoders.get("qqq")


def test_a_broken_plugin_is_named_with_its_real_error_and_hides_nothing(install):
    install("fake-broken", rewards_of(wreck="fake_wreck:X"), fake_wreck="raise ImportError('needs libfoo')")
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
    assert {"blur", "wreck", "clip"} <= set(rewards.names())
    assert rewards.get("blur").__name__ == "BlurConfig"
    with pytest.raises(PartError, match=r"'wreck' .* from fake-broken 1\.0 .*ImportError: needs libfoo"):
        rewards.get("wreck")
    with pytest.raises(PartError, match="did you mean 'blur'"):
        rewards.get("blurr")


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        ("fake_bad:Missing", "", "has no attribute 'Missing'"),
        ("fake_bad:X:Y", "", "must be 'module:attribute'"),
        ("fake_bad:X", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("fake_bad:X", "X = 3", "must be a PartConfig class"),
        ("fake_bad:X", "class X: pass", "must be a PartConfig class"),
        ("fake_bad:BlurConfig", GOOD, "calls itself 'blur', but is registered as 'bad'; write name: Literal"),
        ("fake_bad:X", "from longalign.registry import PartConfig\nclass X(PartConfig): pass", "no build"),
        (
            "fake_bad:X",
            GOOD + "\nclass X(BlurConfig):\n    def build(self): pass",
            "X.build must take (self, runtime): too many",
        ),
        ("fake_bad:x", "def x(images): pass", "must take (images, prompts): too many"),
        (
            "fake_bad:X",
            GOOD.replace('"blur"', '"bad"') + "\nclass X(BlurConfig, extra='ignore'): pass",
            "must keep frozen=True and extra='forbid'",
        ),
    ],
)
def test_a_part_with_mistakes_is_refused_with_what_to_do(install, target, text, message):
    install("fake-bad", rewards_of(bad=target), fake_bad=text)
    with pytest.raises(PartError, match=r"from fake-bad 1\.0") as error:
        rewards.get("bad")
    assert message in str(error.value)


def test_a_config_class_that_fails_while_checking_values_is_named(install):
    text = GOOD + "    def model_post_init(self, context):\n        raise KeyError('oops')\n"
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=text)
    with pytest.raises(ConfigError, match=r"the config class from fake-blur 1\.0 failed: KeyError: 'oops'"):
        rewards.validate("blur")


def test_two_owners_of_a_name_are_refused_and_both_named(install):
    for name in ("fake-a", "fake-b"):
        install(name, rewards_of(blur=f"{name.replace('-', '_')}:BlurConfig"), **{name.replace("-", "_"): GOOD})
    with pytest.raises(PartError, match=r"claimed by .*fake-[ab] 1\.0 .* and fake-[ab] 1\.0") as error:
        rewards.get("blur")
    assert "fake-a" in str(error.value)
    assert "fake-b" in str(error.value)
    assert len(rewards.infos("blur")) == 2
    assert rewards.get("clip")


def test_a_second_copy_of_a_distribution_is_no_rival(install, tmp_path):
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
    (tmp_path / "fake-blur").rename(tmp_path / "stale")
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), version="2.0", fake_blur=GOOD)
    sys.path.append(str(tmp_path / "stale"))
    try:
        assert rewards.info("blur").owner == "fake-blur 2.0"
    finally:
        sys.path.remove(str(tmp_path / "stale"))


def test_malformed_metadata_of_one_distribution_leaves_the_others(install):
    install("fake-mangled", "[longalign_rewards]\nno equals sign here\n")
    assert "clip" in rewards
    assert [who for who, _ in discovery.discover().malformed] == ["fake-mangled 1.0"]
    with pytest.raises(PartError, match=r"entry points of fake-mangled 1\.0 cannot be read"):
        rewards.get("mangled")


def test_a_distribution_without_a_name_hides_no_other(install):
    for name in ("one", "two"):
        install(f"fake-{name}", rewards_of(**{name: f"fake_{name}:BlurConfig"}))
        next(Path(p) for p in sys.path if p.endswith(f"fake-{name}")).joinpath(
            f"fake_{name}-1.0.dist-info/METADATA"
        ).unlink()
    assert {"one", "two"} <= set(rewards.names())


def test_entry_points_that_are_not_text_disable_nothing(tmp_path):
    """As catalogue reads all of them when it is imported, in a process of its own."""
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
    assert "longalign.rewards.configs:DenscoreConfig" in done.stdout
    assert "entry points of fake-latin 1.0 cannot be read: UnicodeDecodeError" in done.stderr
    assert "entry points of fake-mangled 1.0 cannot be read:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_misspelt_group_is_reported_with_the_one_that_is_meant(install):
    install("fake-typo", "[longalign_reward]\nblurry = fake_typo:X\n[longalign.encoders]\nother = fake_typo:X\n")
    problems = list_parts()[1]
    assert (
        "fake-typo 1.0 discover 'blurry' in the group 'longalign_reward', which is not read; "
        "did you mean 'longalign_rewards'?"
    ) in problems
    assert any("'longalign.encoders'" in problem and "'longalign_encoders'" in problem for problem in problems)
    with pytest.raises(PartError, match=r"fake-typo 1\.0 discover 'blurry' in the group 'longalign_reward'"):
        rewards.get("blurry")


def test_a_name_claimed_twice_is_reported_by_list(install):
    for who in ("one", "two"):
        install(f"fake-{who}", rewards_of(blur=f"fake_{who}:BlurConfig"), **{f"fake_{who}": GOOD})
    table, problems = list_parts(["rewards"])
    assert table.count(" blur ") == 2
    assert any("claimed by fake-" in problem for problem in problems)


def test_a_part_is_checked_when_it_is_built(install):
    text = GOOD.replace(
        "return lambda images, prompts: made",
        "return self.radius / 0 if self.radius < 0 else [].x if self.radius > 9 else 3",
    )
    install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=text)
    with pytest.raises(PartError, match=r"'blur' among rewards, from fake-blur 1\.0, was built as a int, .*\.Reward"):
        rewards.build("blur", Runtime())
    with pytest.raises(PartError, match=r"from fake-blur 1\.0, failed to build: AttributeError"):
        rewards.build({"name": "blur", "radius": 10}, Runtime())


def test_metadata_is_read_once_and_again_after_an_installation(install, monkeypatch):
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
    """A registry of a kind of its own, left empty."""
    registry = Registry("test-kind")
    yield registry
    for name in registry.names():
        registry.unregister(name)


class ThingConfig(PartConfig):
    name: Literal["thing"] = "thing"
    size: int = 1

    def build(self, runtime):
        return self.size


def test_registration_in_code(local):
    assert local.register("thing")(ThingConfig) is ThingConfig
    assert local.build({"name": "thing", "size": 3}, Runtime()) == 3
    assert local.info("thing").owner == "this process"
    local.unregister("thing")
    assert "thing" not in local
    with pytest.raises(PartError, match="nothing to remove"):
        local.unregister("thing")


def test_a_plain_function_is_a_part_without_keys(local):
    def brightness(images, prompts):
        return "scored"

    scoring = Registry("scoring-things", function=("images", "prompts"))
    scoring.register("brightness", brightness)
    assert scoring.build("brightness", Runtime()) is brightness
    assert scoring.info("brightness").target.endswith("brightness")
    with pytest.raises(ConfigError, match="this key does not exist"):
        scoring.validate({"name": "brightness", "size": 1})
    with pytest.raises(PartError, match=r"must take \(images, prompts\): too many positional"):
        scoring.register("other", lambda images: images)
    with pytest.raises(PartError, match="must be a PartConfig class with a build method, not <function"):
        local.register("brightness", brightness)
    scoring.unregister("brightness")


def test_running_a_cell_again_replaces_but_another_class_is_refused(local):
    local.register("thing", ThingConfig)
    again = type("ThingConfig", (ThingConfig,), {"__module__": __name__, "__qualname__": "ThingConfig"})
    local.register("thing", again)
    assert local.get("thing") is again
    other = type("OtherConfig", (ThingConfig,), {"__module__": __name__})
    with pytest.raises(PartError, match="already owned by this process"):
        local.register("thing", other)


def test_a_built_in_name_cannot_be_taken_in_code():
    class MineConfig(ThingConfig):
        name: Literal["clip"] = "clip"

    with pytest.raises(PartError, match="'clip' among rewards is already owned by longalign "):
        rewards.register("clip", MineConfig)


@pytest.mark.parametrize("name", ["Thing", "a_b", "a--b", "-a", "a b", ""])
def test_names_are_in_kebab_case(local, name):
    with pytest.raises(PartError, match="kebab case"):
        local.register(name, ThingConfig)


def test_a_name_in_code_and_an_entry_point_that_came_later_are_both_named(install):
    class BlurConfig(ThingConfig):
        name: Literal["blur"] = "blur"

    rewards.register("blur", BlurConfig)
    try:
        install("fake-blur", rewards_of(blur="fake_blur:BlurConfig"), fake_blur=GOOD)
        with pytest.raises(PartError, match=r"this process .* and fake-blur 1\.0"):
            rewards.get("blur")
    finally:
        rewards.unregister("blur")


def test_all_faults_of_a_part_come_at_once_with_their_paths(local):
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
    assert problems["inner.chekpoint"] == "this key does not exist; did you mean 'checkpoint'?"
    assert problems["cuont"] == "this key does not exist; did you mean 'count'?"
    assert problems["count"].endswith("got 'many'")
    assert len(problems) == 3


def test_a_config_value_is_checked_again_and_must_be_the_registered_class(local):
    local.register("thing", ThingConfig)
    assert local.validate(ThingConfig(size=2)) == ThingConfig(size=2)
    with pytest.raises(ConfigError, match="size"):
        local.validate(ThingConfig().model_copy(update={"size": "large"}))

    class OtherConfig(ThingConfig):
        pass

    with pytest.raises(ConfigError, match="'thing' among test-kind is ThingConfig, not OtherConfig"):
        local.validate(OtherConfig())


@pytest.mark.parametrize("value", [None, 3, {"checkpoint": "x"}, {"name": 3}, ["clip"]])
def test_what_is_neither_name_nor_mapping_is_refused(value):
    with pytest.raises(ConfigError, match="expected a name or a mapping with 'name', one of clip"):
        rewards.validate(value)


def test_infinities_are_refused(local):
    class RateConfig(PartConfig):
        name: Literal["rate"] = "rate"
        rate: float = 1.0

        def build(self, runtime):
            return self.rate

    local.register("rate", RateConfig)
    with pytest.raises(ConfigError, match="finite"):
        local.validate({"name": "rate", "rate": float("nan")})
