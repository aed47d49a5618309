import xml.etree.ElementTree as ET

from longalign.evaluation.bootstrap import Interval
from longalign.evaluation.charts import curves, intervals, smooth, ticks

NAN = float("nan")


def test_ticks_are_round_and_within_range():
    assert ticks(0, 10) == [0, 5, 10]
    assert ticks(-0.13, 0.42) == [0, 0.2, 0.4]
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(3, 3) == [3]


def test_smooth_shrinks_window_at_ends():
    assert smooth([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert smooth([1, 5], 1) == [1, 5]


def points(svg, name):
    line = next(e for e in ET.fromstring(svg).iter("polyline") if e.get("class").split()[0] == name)
    return [tuple(float(v) for v in p.split(",")) for p in line.get("points").split()]


def test_curves_axis_directions():
    pixels = points(curves("loss & more", {"run": ([0, 10, 20], [1.0, 3.0, 2.0])}), "raw")
    assert [x for x, _ in pixels] == [52, 220, 388]
    (_, low), (_, high), (_, middle) = pixels
    assert high < middle < low  # y grows downwards
    assert abs((middle - high) - (low - middle)) < 0.2


def test_curves_skips_non_finite_values():
    assert len(points(curves("loss", {"run": ([0, 1, 2], [1.0, NAN, 2.0])}), "raw")) == 2
    assert "no values" in curves("loss", {"run": ([0], [NAN])}) and "no values" in curves("loss", {"run": ([], [])})


def test_curves_several_lines_have_names_and_one_axis():
    svg = curves("reward", {"training": ([0, 2], [0.0, 4.0]), "held <out>": ([0, 2], [0.0, 2.0])})
    lines = [e.get("points").split() for e in ET.fromstring(svg).iter("polyline") if "raw" in e.get("class")]
    (start, high), (other_start, low) = [[float(p.split(",")[1]) for p in line] for line in lines]
    assert start == other_start and abs((start - high) - 2 * (start - low)) < 0.2
    assert "held &lt;out&gt;" in svg and "training from 0 to 4" in svg
    classes = [e.get("class") for e in ET.fromstring(svg).iter() if (e.get("class") or "").startswith(("dot", "mean"))]
    colors = [name.rpartition("-")[2] for name in classes]
    assert colors[:2] == colors[2:] and len(set(colors)) == 2  # of the legend and of the lines
    assert 'class="mark" x1="220.0"' in curves("reward", {"run": ([0, 2], [0.0, 4.0])}, mark=1)


def test_intervals_limits_set_the_axis():
    svg = intervals("facts", {"a": {"base": Interval(0.5, 0.4, 0.6, 5)}}, lambda v: f"{100 * v:.1f}", (0.0, 1.0))
    texts = [e.text for e in ET.fromstring(svg).iter("text")]
    assert texts[:6] == ["0", "20", "40", "60", "80", "100"]


def test_intervals_positions_and_titles():
    rows = {"short": {"base": Interval(0.2, 0.1, 0.3, 5), "tuned": Interval(0.6, 0.5, 0.7, 5)},
            "long <b>": {"base": Interval(NAN, NAN, NAN, 0), "tuned": Interval(0.5, 0.4, 0.6, 5)}}  # fmt: skip
    svg = intervals("facts", rows, lambda v: f"{v:.1f}")
    root = ET.fromstring(svg)
    groups = list(root.iter("g"))
    assert [g.get("class") for g in groups] == ["model-0", "model-1", "model-1"]
    assert groups[0].find("title").text == "base: 0.2 [0.1, 0.3]"
    x = [float(g.find("circle").get("cx")) for g in groups]
    assert x[0] < x[2] < x[1]
    line = groups[0].find("line")
    assert float(line.get("x1")) < x[0] < float(line.get("x2"))
    assert "no values" in intervals("facts", {"a": {"base": Interval(NAN, NAN, NAN, 0)}}, str)
