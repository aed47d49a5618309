import json
import math

import numpy as np
import pytest

from longalign.table import Interval, MetricTable, bootstrap, length_labels

NAN = float("nan")


def table(**metrics):
    prompts = ["a b", "c d e", "a b c d", "e f"]
    return MetricTable(metrics, prompts, [0, 1, 2, 3])


def test_the_interval_of_equal_values_is_a_point():
    assert bootstrap(np.array([2.0, 2.0, 2.0])) == Interval(2.0, 2.0, 2.0, 3, prompts=3)


def test_missing_values_are_left_out():
    assert bootstrap(np.array([1.0, NAN, 1.0])) == Interval(1.0, 1.0, 1.0, 2, prompts=2)
    nothing = bootstrap(np.array([NAN]))
    assert nothing.count == 0 and math.isnan(nothing.mean)


def test_the_interval_covers_like_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found == bootstrap(values)


def test_images_of_one_prompt_are_drawn_together():
    # two prompts with eight equal images each carry the information of two values, not of sixteen
    values = np.repeat([0.0, 1.0], 8)
    together = bootstrap(values, groups=["a"] * 8 + ["b"] * 8)
    assert (together.low, together.mean, together.high) == (0.0, 0.5, 1.0)
    assert bootstrap(values).low > 0.2


def test_paired_differences_see_what_separate_intervals_hide():
    base = np.array([0.1, 0.9, 0.3, 0.7])
    found = table(base={"facts": base}, tuned={"facts": base + 0.05})
    assert found.interval("tuned", "facts").low < found.interval("base", "facts").mean
    gain = found.difference("tuned", "facts")
    assert gain.low == pytest.approx(0.05) and gain.high == pytest.approx(0.05)


def test_each_model_is_compared_with_the_base_and_with_the_one_before_it():
    ones = np.ones(4)
    found = table(base={"facts": 0 * ones}, first={"facts": 0.5 * ones}, second={"facts": 0.75 * ones})
    assert found.pairs == [("first", "base"), ("second", "base"), ("second", "first")]
    means = {name: row["facts"]["mean"] for name, row in found.to_dict()["differences"].items()}
    assert means == {"first - base": 0.5, "second - base": 0.75, "second - first": 0.25}
    assert "second - first  +25.0 [+25.0, +25.0]" in found.text()


def test_lengths_fall_into_buckets():
    assert length_labels(["a", "a b c", "a b c d e", "a b"], edges=(2, 4)) == ["1-2", "3-4", "over 4", "1-2"]
    assert length_labels(["aaaa"], edges=(2, 4), count=len) == ["3-4"]


def test_groups_come_in_the_order_of_their_numbers():
    found = table(base={"facts": np.array([0.0, 1.0, 0.5, 0.5])})
    by = found.by("facts", ["over 9", "1-2", "10-20", "1-2"])
    assert list(by) == ["1-2", "10-20", "over 9"]
    assert by["1-2"]["base"].mean == 0.75 and by["over 9"]["base"].count == 1


def test_the_texts_hold_means_differences_and_shares():
    half = np.full(4, 0.5)
    base = {"facts": half, "facts/attribute/colour": half, "denscore": half / 2}
    tuned = {"facts": half + 0.25, "facts/attribute/colour": np.array([1.0, NAN, 1.0, 1.0]), "denscore": half / 2}
    found = table(base=base, tuned=tuned)
    text = found.text()
    assert "4 prompts; mean [95% bootstrap interval]" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "base 50.0 [50.0, 50.0] 0.2500 [0.2500, 0.2500]" in lines
    assert "tuned - base +25.0 [+25.0, +25.0] +0.0000 [+0.0000, +0.0000]" in lines
    assert "fact accuracy, % by attribute" in lines
    assert "colour 50.0 [50.0, 50.0] 100.0 [100.0, 100.0]" in lines
    assert "| tuned | 75.0 [75.0, 75.0] | 0.2500 [0.2500, 0.2500] |" in found.markdown()


def test_the_json_form_survives_a_round_trip():
    found = table(base={"facts": np.array([0.0, NAN, 1.0, 0.5])}, tuned={"facts": np.ones(4)})
    data = json.loads(found.json())
    assert data["values"]["base"]["facts"] == [0.0, None, 1.0, 0.5]
    assert data["means"]["base"]["facts"]["mean"] == 0.5
    assert data["differences"]["tuned - base"]["facts"]["count"] == 3
    assert MetricTable.from_dict(data).to_dict() == found.to_dict()


def test_wrong_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="one value for each of the 4 prompts"):
        table(base={"facts": np.ones(3)})
    with pytest.raises(ValueError, match="no 'beauty' of 'base'; there is facts of base"):
        table(base={"facts": np.ones(4)}).row("base", "beauty")


def compared(prompts, images=1):
    """Two models of which the second gains, loses in one share, and does not change in a second metric."""
    half = np.full(prompts * images, 0.5)
    base = {"facts": half, "facts/attribute/fill": half, "facts/attribute/ground": half, "denscore": half}
    tuned = {**base, "facts": half + 0.1, "facts/attribute/ground": half - 0.2}
    texts = [f"prompt {i}" for i in range(prompts) for _ in range(images)]
    return MetricTable({"base": base, "tuned": tuned}, texts, list(range(images)) * prompts)


def test_no_difference_is_significant_below_ten_prompts():
    for few in (compared(2), compared(9), compared(2, images=16)):
        assert few.significant("tuned") == ({}, {})
        assert "+10.0 [+10.0, +10.0]" in few.text() and "] *" not in few.text()
        assert "fewer than 10 prompts" in few.text() and "fewer than 10 prompts" in few.markdown()
    assert "+10.0 [+10.0, +10.0] *" in compared(10).text() and "fewer than" not in compared(10).text()


def test_significant_losses_are_named_beside_gains():
    found = compared(10)
    gains, losses = found.significant("tuned")
    assert list(gains) == ["facts"] and list(losses) == ["facts/attribute/ground"]
    assert losses["facts/attribute/ground"].mean == pytest.approx(-0.2)
    assert found.to_dict()["significant"] == {
        "tuned - base": {"gains": ["facts"], "losses": ["facts/attribute/ground"]}
    }
    lines = [" ".join(line.split()) for line in found.text().splitlines()]
    assert "tuned - base fact accuracy/attribute/ground, % -20.0 [-20.0, -20.0] *" in lines
    assert "significant losses" in found.markdown()


def test_a_table_fits_the_terminal():
    values = {f"metric-{i}": np.arange(12.0) for i in range(6)}
    found = MetricTable({"base": values, "tuned": values}, [str(i) for i in range(12)])
    assert max(map(len, found.text().splitlines())) > 80
    narrow = found.text(width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert all(narrow.count(f"metric-{i} ") + narrow.count(f"metric-{i}\n") >= 2 for i in range(6))
    assert max(map(len, found.text(width=10).splitlines())) < 50  # one column each, however narrow


def test_breakdowns_have_paired_differences():
    found = table(
        base={"facts": np.array([0.1, 0.9, 0.3, 0.7]), "facts/attribute/size": np.array([1.0, NAN, 1.0, 1.0])},
        b={"facts": np.array([0.2, 1.0, 0.4, 0.8]), "facts/attribute/size": np.array([0.5, NAN, 0.5, 0.5])},
    )
    (title,) = found.breakdowns("facts", paired=True)
    assert found.breakdowns("facts", paired=True)[title] == {"size": {"b - base": Interval(-0.5, -0.5, -0.5, 3, 3)}}
    lengths = found.by("facts", ["x", "x", "y", "y"], paired=True)
    assert lengths["y"]["b - base"].mean == pytest.approx(0.1)
    assert f"paired differences, {title}" in found.text() and "| b - base | -50.0" in found.markdown()
    assert table(base={"facts": np.zeros(4)}).breakdowns("facts", paired=True) == {}
