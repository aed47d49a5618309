"""Selection of gradient-carrying steps, against values computed by hand."""

import pytest
import torch

from longalign.errors import ConfigError
from longalign.gradient_steps import GroupedRandom, Last
from longalign.gradient_steps.base import GradientSteps
from longalign.gradient_steps.random import synced_randint
from longalign.registry import gradient_steps, trainers
from longalign.runtime import Runtime


def grouped(groups, **settings):
    return GroupedRandom(groups, **{"detach": True, "randint": synced_randint(Runtime()), **settings})


def last(k, **settings):
    return Last(k, **{"detach": True, "randint": synced_randint(Runtime()), **settings})


def test_grouped_random_selects_one_step_per_group():
    samples = [grouped(5).select(50).steps for _ in range(200)]
    for steps in samples:
        assert list(steps) == list(range(steps[0], 50, 10))
    assert {steps[0] for steps in samples} == set(range(10))


def test_grouped_random_is_seeded_by_torch():
    torch.manual_seed(3)
    selected = grouped(2).select(50)
    torch.manual_seed(3)
    assert grouped(2).select(50) == selected


def test_last_and_all_select_steps():
    assert last(2).select(10) == GradientSteps((8, 9), length=10)
    assert last(1, copies=3, detach=False).select(2) == GradientSteps((1,), detach=False, length=2, copies=3)
    assert gradient_steps.build("all").select(3) == GradientSteps((0, 1, 2), length=3)
    assert grouped(4, detach=False).select(4) == GradientSteps((0, 1, 2, 3), detach=False, length=4)


def test_early_stop_randomises_length():
    selections = {last(2, early_stop=3).select(10) for _ in range(200)}
    assert selections == {GradientSteps((n - 2, n - 1), length=n) for n in (8, 9, 10)}
    for _ in range(200):
        selected = grouped(2, early_stop=3).select(8)
        assert selected.length in (6, 7, 8)
        offset = selected.steps[0]
        assert selected.steps == tuple(i for i in (offset, offset + 4) if i < selected.length)


def test_last_min_steps_randomises_number_of_steps():
    selections = {last(3, min_steps=2, detach=False).select(5).steps for _ in range(100)}
    assert selections == {(3, 4), (2, 3, 4)}
    assert {len(last(None, min_steps=1).select(3).steps) for _ in range(100)} == {1, 2, 3}


def test_synced_randint_uses_number_of_first_process():
    second = Runtime(gather=lambda number: torch.cat([torch.tensor([7]), number]))
    assert {synced_randint(second)(0, 9) for _ in range(20)} == {7}
    assert {synced_randint(Runtime())(0, 2) for _ in range(100)} == {0, 1, 2}
    expected = {"grouped-random": (7, 17, 27, 37, 47), "refl": (6,), "align-prop": tuple(range(43, 50))}
    for name, steps in expected.items():
        assert gradient_steps.build(name, second).select(50).steps == steps


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("all", GradientSteps((0, 1, 2, 3), length=4)),
        ({"name": "all", "detach": False}, GradientSteps((0, 1, 2, 3), detach=False, length=4)),
        ({"name": "last", "k": 2}, GradientSteps((2, 3), length=4)),
        ({"name": "last", "k": 2, "detach": False}, GradientSteps((2, 3), detach=False, length=4)),
        ({"name": "grouped-random", "groups": 4, "detach": False}, GradientSteps((0, 1, 2, 3), detach=False, length=4)),
        ({"name": "draft-k", "k": 3}, GradientSteps((1, 2, 3), detach=False, length=4)),
        ("draft-lv", GradientSteps((3,), length=4, copies=2)),
        ({"name": "align-prop", "min_steps": 2, "max_steps": 2}, GradientSteps((2, 3), detach=False, length=4)),
        ({"name": "refl", "early_stop": 1}, GradientSteps((3,), length=4)),
        ({"name": "drtune", "groups": 4, "early_stop": 1}, GradientSteps((0, 1, 2, 3), length=4)),
    ],
    ids=str,
)
def test_configs_build_selectors(config, expected):
    assert gradient_steps.build(config).select(4) == expected
    assert gradient_steps.validate(config).detaches() == expected.detach


def test_refl_align_prop_drtune_vary_between_batches():
    selections = {
        name: {gradient_steps.build(name).select(50) for _ in range(100)} for name in ("refl", "align-prop", "drtune")
    }
    assert {selected.length for selected in selections["refl"]} == set(range(41, 51))
    assert all(selected.steps == (selected.length - 1,) for selected in selections["refl"])
    assert len({len(selected.steps) for selected in selections["align-prop"]}) > 20
    assert {len(selected.steps) for selected in selections["drtune"]} == {4, 5}


@pytest.mark.parametrize(
    ("num_steps", "config", "message"),
    [
        (50, {"name": "grouped-random", "groups": 3}, "50 sampling steps .*3 equal groups"),
        (50, {"name": "drtune", "groups": 3}, "50 sampling steps .*3 equal groups"),
        (8, {"name": "drtune", "groups": 2, "early_stop": 6}, "6 of 8 .*early_stop of at most 5"),
        (4, {"name": "last", "k": 5}, "last 5 of 4 sampling steps.*at most 4"),
        (4, {"name": "draft-k", "k": 5}, "last 5 of 4 sampling steps.*at most 4"),
        (4, {"name": "align-prop", "min_steps": 5}, "last 5 of 4 sampling steps.*at most 4"),
        (50, {"name": "align-prop", "min_steps": 5, "max_steps": 2}, "max_steps .*min_steps, 5, got 2"),
        (4, {"name": "refl", "early_stop": 5}, "5 of 4 .*early_stop of at most 4"),
    ],
)
def test_reward_config_rejects_impossible_gradient_steps(num_steps, config, message):
    with pytest.raises(ConfigError, match=message):
        trainers.validate({"name": "reward", "num_steps": num_steps, "gradient_steps": config})


def test_select_rejects_impossible_number_of_steps():
    with pytest.raises(ValueError, match=r"50 sampling steps .*3 equal groups"):
        grouped(3).select(50)
    with pytest.raises(ValueError, match="last 3 of 2 sampling steps"):
        last(3).select(2)
    with pytest.raises(ValueError, match=r"3 of 4 .*early_stop of at most 2"):
        last(3, early_stop=3).select(4)
