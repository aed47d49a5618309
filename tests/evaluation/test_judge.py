"""Pairwise comparison by a vision-language model."""

import logging
import math

import numpy as np
import pytest
import torch
from chat_server import chat_server, images_of, question_of, reply

from longalign.evaluation.judge import Judge, add_win_rates
from longalign.evaluation.table import MetricTable
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_vlm
from longalign.vlm.config import JudgeConfig


def judge(url, **settings):
    vlm = {"base_url": url, "model": "m", "attempts": 1}
    return Judge.from_config(JudgeConfig(vlm=vlm, cache=None, **settings), Runtime())


def images(*values):
    return [torch.full((3, 4, 4), value) for value in values]


def brighter(number, body):
    """Prefers the brighter image; says first for equal ones."""
    first, second = (image.mean() for image in images_of(body))
    return reply("2" if second > first else "1")


def test_judge_counts_wins_losses_and_order_dependent_ties():
    with chat_server(brighter) as server:
        values = judge(server.url).compare(images(0.9, 0.1, 0.5), images(0.2, 0.8, 0.5), ["a", "b", "c"])
    assert values["win_rate"].tolist() == [1, 0, 0.5]
    assert values["win_rate/verdict/tie"].tolist() == [0, 0, 1]
    assert values["win_rate/verdict/order"].tolist() == [0, 0, 1]
    assert len(server.requests) == 5  # equal images are one request in both orders


def test_judge_counts_one_tie_as_a_tie():
    with chat_server(lambda number, body: reply("tie" if images_of(body)[0].mean() > 100 else "2")) as server:
        values = judge(server.url).compare(images(0.9), images(0.2), ["a"])
    assert [float(v[0]) for v in values.values()] == [0.5, 1, 0]


def test_judge_prompt_text_names_the_prompt():
    with chat_server(lambda number, body: reply("tie")) as server:
        judge(server.url, prompt="{x} {prompt}?").compare(images(0.9), images(0.2), ["a {fox}"])
    assert {question_of(body) for *_, body in server.requests} == {"{x} a {fox}?"}


def test_pair_without_verdict_has_no_value(caplog):
    with chat_server(lambda number, body: reply("both")) as server, caplog.at_level(logging.WARNING):
        values = judge(server.url).compare(images(0.9), images(0.2), ["a"])
    assert all(np.isnan(v).all() for v in values.values()) and "1 of 1 " in caplog.text


def test_judge_reports_different_numbers_of_images():
    with pytest.raises(ValueError, match="2 and 1 images and 1 prompts"):
        judge("http://127.0.0.1:9/v1").compare(images(0.9, 0.1), images(0.2), ["a"])


def test_win_rates_join_the_table():
    prompts = [f"prompt {i}" for i in range(12)]
    models = {"base": images(*[0.5] * 12), "worse": images(*[0.2] * 12), "better": images(*[0.9] * 10, 0.1, 0.1)}
    table = MetricTable({name: {"x": np.arange(12.0)} for name in models}, prompts)
    with chat_server(brighter) as server:
        table = add_win_rates(table, models, judge(server.url))
    assert table.metrics == ["x", "win_rate"]
    assert [table.interval(name, "win_rate").mean for name in models] == pytest.approx([0.5, 0, 10 / 12])
    assert table.difference("worse", "win_rate").mean == -0.5 and table.difference("worse", "win_rate").significant
    assert math.isnan(table.interval("base", "win_rate/verdict/tie").mean)
    assert "win-rate" in table.text()


def test_win_rates_need_two_models():
    table = MetricTable({"base": {"x": np.zeros(1)}}, ["a"])
    with pytest.raises(ValueError, match="'base'"):
        add_win_rates(table, {"base": images(0.5)}, judge("http://127.0.0.1:9/v1"))


def test_local_judge_swaps_the_images(tmp_path):
    config = JudgeConfig(vlm={"checkpoint": str(tiny_vlm(tmp_path / "vlm"))}, cache=str(tmp_path / "cache"))
    pairs = [torch.rand(3, 32, 32) for _ in range(4)], [torch.rand(3, 32, 32) for _ in range(4)]
    local = Judge.from_config(config, Runtime())
    forward, backward = local.compare(*pairs, ["a red"] * 4), local.compare(*pairs[::-1], ["a red"] * 4)
    np.testing.assert_array_equal(forward["win_rate"], 1 - backward["win_rate"])
    assert len((tmp_path / "cache" / "answers.jsonl").read_text().splitlines()) == 8
