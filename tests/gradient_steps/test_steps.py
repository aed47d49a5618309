"""Choices that can be worked out by hand."""

import pytest
import torch

from longalign.errors import ConfigError
from longalign.gradient_steps.base import GradientSteps
from longalign.gradient_steps.steps import All, GroupedRandom, Last, synced_randint
from longalign.registry import gradient_steps, trainers
from longalign.runtime import Runtime


def test_one_step_in_each_group_at_the_same_offset():
    picks = [GroupedRandom(5).select(50).steps for _ in range(200)]
    for steps in picks:
        assert list(steps) == list(range(steps[0], 50, 10))
    assert {steps[0] for steps in picks} == set(range(10))


def test_picks_follow_torchs_seed():
    torch.manual_seed(3)
    first = GroupedRandom(2).select(50)
    torch.manual_seed(3)
    assert GroupedRandom(2).select(50) == first


def test_last_and_all():
    assert Last(2).select(10) == GradientSteps((8, 9), length=10)
    assert Last(1, copies=3, detach=False).select(2) == GradientSteps((1,), detach=False, length=2, copies=3)
    assert All().select(3) == GradientSteps((0, 1, 2), length=3)
    assert GroupedRandom(4, detach=False).select(4) == GradientSteps((0, 1, 2, 3), detach=False, length=4)


def test_an_early_stop_makes_the_last_step_random():
    picks = {Last(2, early_stop=3).select(10) for _ in range(200)}
    assert picks == {GradientSteps((n - 2, n - 1), length=n) for n in (8, 9, 10)}
    for _ in range(200):
        choice = GroupedRandom(2, early_stop=3).select(8)
        assert choice.length in (6, 7, 8)
        offset = choice.steps[0]
        assert choice.steps == tuple(i for i in (offset, offset + 4) if i < choice.length)


def test_the_number_of_last_steps_can_be_random():
    picks = {Last(3, min_steps=2, detach=False).select(5).steps for _ in range(100)}
    assert picks == {(3, 4), (2, 3, 4)}
    assert {len(Last(None, min_steps=1).select(3).steps) for _ in range(100)} == {1, 2, 3}


def test_processes_agree_on_the_first_ones_number():
    other = Runtime(gather=lambda own: torch.cat([torch.tensor([7]), own]))
    assert {synced_randint(other)(0, 9) for _ in range(20)} == {7}
    assert {synced_randint(Runtime())(0, 2) for _ in range(100)} == {0, 1, 2}
    drawing = {"grouped-random": (7, 17, 27, 37, 47), "refl": (6,), "align-prop": tuple(range(43, 50))}
    for name, steps in drawing.items():
        assert gradient_steps.build(name, other).select(50).steps == steps


@pytest.mark.parametrize(
    ("config", "choice"),
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
def test_configs_make_what_they_say(config, choice):
    assert gradient_steps.build(config).select(4) == choice
    assert gradient_steps.validate(config).detaches() == choice.detach


def test_papers_draw_anew_for_each_batch():
    picks = {
        name: {gradient_steps.build(name).select(50) for _ in range(100)} for name in ("refl", "align-prop", "drtune")
    }
    assert {choice.length for choice in picks["refl"]} == set(range(41, 51))
    assert all(choice.steps == (choice.length - 1,) for choice in picks["refl"])
    assert len({len(choice.steps) for choice in picks["align-prop"]}) > 20
    assert {len(choice.steps) for choice in picks["drtune"]} == {4, 5}


@pytest.mark.parametrize(
    ("num_steps", "config", "message"),
    [
        (50, {"name": "grouped-random", "groups": 3}, "50 sampling steps cannot be divided into 3 equal groups"),
        (50, {"name": "drtune", "groups": 3}, "50 sampling steps cannot be divided into 3 equal groups"),
        (8, {"name": "drtune", "groups": 2, "early_stop": 6}, "early_stop of at most 5"),
        (4, {"name": "last", "k": 5}, "there are 4 sampling steps, fewer than the last 5"),
        (4, {"name": "draft-k", "k": 5}, "fewer than the last 5"),
        (4, {"name": "align-prop", "min_steps": 5}, "fewer than the last 5"),
        (50, {"name": "align-prop", "min_steps": 5, "max_steps": 2}, "max_steps to be at least 5"),
        (4, {"name": "refl", "early_stop": 5}, "early_stop of at most 4"),
    ],
)
def test_impossible_choices_are_refused_where_they_are_configured(num_steps, config, message):
    with pytest.raises(ConfigError, match=message):
        trainers.validate({"name": "reward", "num_steps": num_steps, "gradient_steps": config})


def test_impossible_choices_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="cannot be divided"):
        GroupedRandom(3).select(50)
    with pytest.raises(ValueError, match="fewer than the last 3"):
        Last(3).select(2)
    with pytest.raises(ValueError, match="early_stop of at most 2"):
        Last(3, early_stop=3).select(4)
