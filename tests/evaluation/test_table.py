import json
import math
from dataclasses import replace

import numpy as np
import pytest

from longalign.evaluation.bootstrap import Interval, bootstrap, resamples
from longalign.evaluation.groups import length_labels
from longalign.evaluation.table import MetricTable
from longalign.metrics import Value

NAN = float("nan")
FACTS = {"facts": Value("%")}


def make_table(**metrics):
    prompts = ["a b", "c d e", "a b c d", "e f"]
    return MetricTable(metrics, prompts, [0, 1, 2, 3], FACTS)


def test_bootstrap_equal_values():
    assert bootstrap(np.array([2.0, 2.0, 2.0])) == Interval(2.0, 2.0, 2.0, 3, prompts=3)


def test_bootstrap_skips_nan():
    assert bootstrap(np.array([1.0, NAN, 1.0])) == Interval(1.0, 1.0, 1.0, 2, prompts=2)
    empty = bootstrap(np.array([NAN]))
    assert empty.count == 0 and math.isnan(empty.mean)


def test_bootstrap_matches_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
    assert interval == bootstrap(values)


def test_bootstrap_resamples_groups():
    # two prompts with eight equal images each: two independent values, not sixteen
    values = np.repeat([0.0, 1.0], 8)
    grouped = bootstrap(values, groups=["a"] * 8 + ["b"] * 8)
    assert (grouped.low, grouped.mean, grouped.high) == (0.0, 0.5, 1.0)
    assert bootstrap(values).low > 0.2


def test_bootstrap_resamples_values_within_groups():
    # one group with values 0 and 1: two draws of its values, so 0, 0.5 and 1 with a quarter, a half and a quarter
    counts = resamples(["a", "a", "b"], 400)
    assert counts.shape == (400, 3) and (counts.sum(1) > 0).all()
    twice = counts[(counts[:, 2] == 0)]  # "a" was drawn twice: four draws of its two values
    assert (twice.sum(1) == 4).all() and len(set(twice[:, 0].tolist())) > 2
    varied = bootstrap(np.array([0.0, 1.0]), groups=["a", "a"])
    assert (varied.low, varied.mean, varied.high) == (0.0, 0.5, 1.0)


def test_resamples_are_the_same_for_the_same_groups():
    np.testing.assert_array_equal(resamples(["x", "y", "x"], 20), resamples(["b", "c", "b"], 20))


def test_direction_decides_gains_and_losses():
    values = {"up": np.zeros(12), "down": np.zeros(12), "gauge": np.zeros(12)}
    units = {"down": Value("", "lower"), "gauge": Value("%", None)}
    models = {"base": values, "tuned": {name: row + 0.5 for name, row in values.items()}}
    table = MetricTable(models, [str(i) for i in range(12)], [0] * 12, units)
    gains, losses = table.significant("tuned")
    assert list(gains) == ["up"] and list(losses) == ["down"]
    assert "+50.0 [+50.0, +50.0] *" in table.text() and "down (lower is better)" in table.text()
    assert MetricTable.from_dict(json.loads(table.json())).units == {"up": Value(), **units}
    assert table.main_breakdowns == ["up"]


def test_statistics_of_sets_round_trip_and_have_no_breakdown():
    prompts = [f"a {i}" for i in range(6)] + ["word " * 40] * 6
    sets = {"base": {"fid": np.array([5.0, 4.0, 6.0])}, "tuned": {"fid": np.array([3.0, 2.5, 3.5])}}
    table = MetricTable({"base": {}, "tuned": {}}, prompts, [], {"fid": Value("", "lower")}, sets)
    assert table.metrics == ["fid"] and table.interval("base", "fid").mean == 5
    assert table.difference("tuned", "fid").mean == -2 and table.breakdowns("fid") == {}
    assert MetricTable.from_dict(json.loads(table.json())).to_dict() == table.to_dict()
    assert "-2.0000 [-2.4750, -1.5250]" in table.text()


def test_csv_has_one_line_per_model_and_image():
    table = make_table(base={"facts": np.array([0.0, NAN, 1.0, 0.5])}, tuned={"facts": np.ones(4)})
    lines = table.csv().splitlines()
    assert lines[:3] == ["model,prompt,seed,facts", "base,a b,0,0.0", "base,c d e,1,"] and len(lines) == 9


def test_difference_is_paired():
    base = np.array([0.1, 0.9, 0.3, 0.7])
    table = make_table(base={"facts": base}, tuned={"facts": base + 0.05})
    assert table.interval("tuned", "facts").low < table.interval("base", "facts").mean
    gain = table.difference("tuned", "facts")
    assert gain.low == pytest.approx(0.05) and gain.high == pytest.approx(0.05)


def test_pairs_with_base_and_previous_model():
    ones = np.ones(4)
    table = make_table(base={"facts": 0 * ones}, first={"facts": 0.5 * ones}, second={"facts": 0.75 * ones})
    assert table.pairs == [("first", "base"), ("second", "base"), ("second", "first")]
    means = {name: row["facts"]["mean"] for name, row in table.to_dict()["differences"].items()}
    assert means == {"first - base": 0.5, "second - base": 0.75, "second - first": 0.25}
    assert "second - first  +25.0 [+25.0, +25.0]" in table.text()


def test_length_labels():
    assert length_labels(["a", "a b c", "a b c d e", "a b"], edges=(2, 4)) == ["1-2", "3-4", "over 4", "1-2"]
    assert length_labels(["aaaa"], edges=(2, 4), count=len) == ["3-4"]


def test_by_group_sorts_labels_by_number():
    table = make_table(base={"facts": np.array([0.0, 1.0, 0.5, 0.5])})
    groups = table.by_group("facts", ["over 9", "1-2", "10-20", "1-2"])
    assert list(groups) == ["1-2", "10-20", "over 9"]
    assert groups["1-2"]["base"].mean == 0.75 and groups["over 9"]["base"].count == 1


def test_text_and_markdown_show_means_differences_and_submetrics():
    half = np.full(4, 0.5)
    base = {"facts": half, "facts/attribute/colour": half, "denscore": half / 2}
    tuned = {"facts": half + 0.25, "facts/attribute/colour": np.array([1.0, NAN, 1.0, 1.0]), "denscore": half / 2}
    table = make_table(base=base, tuned=tuned)
    text = table.text()
    assert "4 prompts; mean [95% bootstrap interval]" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "base 50.0 [50.0, 50.0] 0.2500 [0.2500, 0.2500]" in lines
    assert "tuned - base +25.0 [+25.0, +25.0] +0.0000 [+0.0000, +0.0000]" in lines
    assert "fact accuracy, % by attribute" in lines
    assert "colour 50.0 [50.0, 50.0] 100.0 [100.0, 100.0]" in lines
    assert "| tuned | 75.0 [75.0, 75.0] | 0.2500 [0.2500, 0.2500] |" in table.markdown()


def test_json_round_trip():
    table = make_table(base={"facts": np.array([0.0, NAN, 1.0, 0.5])}, tuned={"facts": np.ones(4)})
    data = json.loads(table.json())
    assert data["values"]["base"]["facts"] == [0.0, None, 1.0, 0.5]
    assert data["means"]["base"]["facts"]["mean"] == 0.5
    assert data["differences"]["tuned - base"]["facts"]["count"] == 3
    assert MetricTable.from_dict(data).to_dict() == table.to_dict()


def test_table_breaks_down_by_labels_of_prompts():
    base, tuned = np.array([0.0, 0.5, 1.0, 0.0]), np.ones(4)
    table = make_table(base={"facts": base}, tuned={"facts": tuned})
    labels = {"topic": [("x", "y"), ("y",), (), ("10-20",)], "source": [("one",)] * 4}
    table = replace(table, labels=labels)
    groups = table.breakdowns("facts")["fact accuracy, % by topic of the prompt"]
    assert {name: (row["base"].mean, row["base"].count) for name, row in groups.items()} == {
        "10-20": (0.0, 1),
        "x": (0.0, 1),
        "y": (0.25, 2),
    }
    paired = table.breakdowns("facts", paired=True)["fact accuracy, % by topic of the prompt"]
    assert paired["y"]["tuned - base"].mean == 0.75
    assert "by topic of the prompt" in table.text() and "source" not in table.text()  # all prompts have one source
    assert MetricTable.from_dict(json.loads(table.json())).text() == table.text()
    assert table.csv().splitlines()[:2] == ["model,prompt,seed,topic,source,facts", "base,a b,0,x; y,one,0.0"]


def test_table_invalid_shapes_and_names_raise():
    with pytest.raises(ValueError, match=r"'facts' of 'base'.*\(3,\).*\(4,\)"):
        make_table(base={"facts": np.ones(3)})
    with pytest.raises(ValueError, match=r"'beauty' of 'base'.* facts,.* base$"):
        make_table(base={"facts": np.ones(4)}).row("base", "beauty")


def compared(prompts, images=1):
    """Two models; the second gains in facts, loses in one submetric, and does not change in denscore."""
    half = np.full(prompts * images, 0.5)
    base = {"facts": half, "facts/attribute/fill": half, "facts/attribute/ground": half, "denscore": half}
    tuned = {**base, "facts": half + 0.1, "facts/attribute/ground": half - 0.2}
    texts = [f"prompt {i}" for i in range(prompts) for _ in range(images)]
    return MetricTable({"base": base, "tuned": tuned}, texts, list(range(images)) * prompts, FACTS)


def test_significant_requires_ten_prompts():
    for table in (compared(2), compared(9), compared(2, images=16)):
        assert table.significant("tuned") == ({}, {})
        assert "+10.0 [+10.0, +10.0]" in table.text() and "] *" not in table.text()
        assert "fewer than 10 prompts" in table.text() and "fewer than 10 prompts" in table.markdown()
    assert "+10.0 [+10.0, +10.0] *" in compared(10).text() and "fewer than" not in compared(10).text()


def test_significant_lists_gains_and_losses():
    table = compared(10)
    gains, losses = table.significant("tuned")
    assert list(gains) == ["facts"] and list(losses) == ["facts/attribute/ground"]
    assert losses["facts/attribute/ground"].mean == pytest.approx(-0.2)
    assert table.to_dict()["significant"] == {
        "tuned - base": {"gains": ["facts"], "losses": ["facts/attribute/ground"]}
    }
    lines = [" ".join(line.split()) for line in table.text().splitlines()]
    assert "tuned - base fact accuracy/attribute/ground, % -20.0 [-20.0, -20.0] *" in lines
    assert "significant losses" in table.markdown()


def test_text_splits_columns_to_width():
    values = {f"metric-{i}": np.arange(12.0) for i in range(6)}
    table = MetricTable({"base": values, "tuned": values}, [str(i) for i in range(12)])
    assert max(map(len, table.text().splitlines())) > 80
    narrow = table.text(width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert all(narrow.count(f"metric-{i} ") + narrow.count(f"metric-{i}\n") >= 2 for i in range(6))
    assert max(map(len, table.text(width=10).splitlines())) < 50  # one column per grid, even below the minimum width


def test_breakdowns_paired():
    table = make_table(
        base={"facts": np.array([0.1, 0.9, 0.3, 0.7]), "facts/attribute/size": np.array([1.0, NAN, 1.0, 1.0])},
        b={"facts": np.array([0.2, 1.0, 0.4, 0.8]), "facts/attribute/size": np.array([0.5, NAN, 0.5, 0.5])},
    )
    (title,) = table.breakdowns("facts", paired=True)
    assert table.breakdowns("facts", paired=True)[title] == {"size": {"b - base": Interval(-0.5, -0.5, -0.5, 3, 3)}}
    lengths = table.by_group("facts", ["x", "x", "y", "y"], paired=True)
    assert lengths["y"]["b - base"].mean == pytest.approx(0.1)
    assert f"paired differences, {title}" in table.text() and "| b - base | -50.0" in table.markdown()
    assert make_table(base={"facts": np.zeros(4)}).breakdowns("facts", paired=True) == {}
