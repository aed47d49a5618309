"""Picks that can be worked out by hand."""

import pytest
import torch

from longalign.faults import ConfigError
from longalign.registry import schedules, trainers
from longalign.trainers.schedules import All, GroupedRandom, Last


def test_one_step_in_each_group_at_the_same_offset():
    picks = [GroupedRandom(5).pick(50) for _ in range(200)]
    for pick in picks:
        assert list(pick) == list(range(pick[0], 50, 10))
    assert {pick[0] for pick in picks} == set(range(10))


def test_picks_follow_torchs_seed():
    torch.manual_seed(3)
    first = GroupedRandom(2).pick(50)
    torch.manual_seed(3)
    assert GroupedRandom(2).pick(50) == first


def test_last_and_all():
    assert Last(2).pick(10) == (8, 9)
    assert All().pick(3) == (0, 1, 2)
    assert GroupedRandom(4).pick(4) == (0, 1, 2, 3)


def test_impossible_choices_are_refused_where_they_are_configured():
    with pytest.raises(ConfigError, match="50 sampling steps cannot be divided into 3 equal groups"):
        trainers.validate({"name": "reward", "schedule": {"name": "grouped-random", "groups": 3}})
    with pytest.raises(ConfigError, match="there are 4 sampling steps, fewer than the last 5"):
        trainers.validate({"name": "reward", "num_steps": 4, "schedule": {"name": "last", "k": 5}})
    with pytest.raises(ValueError, match="cannot be divided"):
        GroupedRandom(3).pick(50)
    with pytest.raises(ValueError, match="fewer than the last 3"):
        Last(3).pick(2)


def test_found_by_name():
    assert {"all", "grouped-random", "last"} <= set(schedules.names())
    assert schedules.build({"name": "last", "k": 2}).pick(5) == (3, 4)
    assert schedules.build("all").pick(2) == (0, 1)
    assert len(schedules.build("grouped-random").pick(50)) == 5


def test_contradictory_reward_configs():
    for keys, message in (
        ({"replay_batch": 2}, "set replay_batch to 1 or lora.dropout to 0"),
        ({"regularizer_weight": 1.0}, "no effect without a regularizer"),
        ({"regularizer": "kl"}, "needs a regularizer_weight"),
        ({"guidance": 0.5}, "guidance"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainers.validate({"name": "reward", **keys})
    assert trainers.validate({"name": "reward", "replay_batch": 2, "lora": None}).replay_batch == 2
