import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.metadata import version

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from longalign.evaluation.comparison import findings
from longalign.evaluation.record import machine, non_defaults, read_log
from longalign.evaluation.report import AblationCell, write_report
from longalign.evaluation.report_examples import Example
from longalign.evaluation.table import MetricTable
from longalign.metrics import Value

FACTS = {"facts": Value("%")}


class Part(BaseModel):
    name: str = "align"
    rank: int = 32
    rate: float = 0.1


class Run(BaseModel):
    trainer: Part = Part()
    rewards: tuple[Part, ...] = ()
    seed: int = 0


class Page(HTMLParser):
    """Checks that elements are closed in order; collects sources and text."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br", "input", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def page(tmp_path):
    table = MetricTable(
        {
            "base": {"facts": np.array([0.25, 0.5]), "facts/attribute/colour": np.array([0.5, np.nan])},
            "tuned": {"facts": np.array([0.75, 1.0]), "facts/attribute/colour": np.array([1.0, np.nan])},
        },
        ["A red <b>. Two.", "Three."],
        [0, 1],
        FACTS,
    )
    example = Example(
        sentences=["A red <b>.", "Two."],
        seed=7,
        images={"base": torch.zeros(3, 8, 8), "tuned": torch.ones(3, 8, 8)},
        verdicts={"base": [[True, False], [False]], "tuned": [[True, True], [True]]},
        scores={"base": [0.1, 0.2], "tuned": [0.3, 0.4]},
        truncated={"base": frozenset({1})},
        facts=[["colour red", "shape <i>"], ["size large"]],
        row=0,
    )
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"step": i, "loss": 1 / (i + 1), "lr": 0.5}) for i in range(5)) + "\n")
    path = write_report(
        tmp_path / "deep" / "report.html",
        title="A & B",
        lead="What was done.",
        table=table,
        examples=[example],
        logs={"align": log, "reward": tmp_path / "missing.jsonl"},
        configs={"align": Run(trainer=Part(rank=4))},
        seconds={"align": 12.4},
    )
    text = path.read_text()
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    return text, parser


def test_report_is_self_contained(page):
    text, parser = page
    sources = [source for source in parser.sources if not source.startswith("#")]
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert "@import" not in text and "url(" not in text and "://" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_report_links_lead_to_its_sections(page):
    text, parser = page
    links = [source for source in parser.sources if source.startswith("#")]
    assert {"#metrics", "#images", "#training"} <= set(links) and all(f'id="{link[1:]}"' in text for link in links)


def test_report_policy_allows_only_its_script(page):
    text, _ = page
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert text.index("Content-Security-Policy") < text.index("<style")


def test_report_escapes_text(page):
    text, parser = page
    assert "A &amp; B" in text and "A red &lt;b&gt;." in text and "shape &lt;i&gt;" in text
    assert "A red <b>." in "".join(parser.words)


def test_report_shows_means_differences_and_verdicts(page):
    text, _ = page
    assert "<b>base</b>: fact accuracy 37.5% [25.0, 50.0]." in text
    assert "<b>tuned against base</b>: fact accuracy 87.5%, +50.0 [+50.0, +50.0] points." in text
    assert '<td data-label="tuned - base"><span>+50.0</span>' in text  # two prompts are too few for a significant one
    chips = re.findall(r'<span class="chip ([^"]*)"( data-facts="[01]*")?>(.*?)</span></td>', text)
    assert chips == [
        ("part s0", ' data-facts="10"', "<b>1/2</b><small>0.100</small>"),
        ("true s3", ' data-facts="11"', "<b>2/2</b><small>0.300</small>"),
        ("false s1 truncated", ' data-facts="0"', "<b>0/1</b><small>0.200</small>"),
        ("true s4", ' data-facts="1"', "<b>1/1</b><small>0.400</small>"),
    ]
    assert "1 of 3 facts" in text and "3 of 3 facts" in text
    assert 'data-words="4" data-length="1-30" data-changes="0.5000"' in text
    assert ">by attribute<" in text


def test_report_significant_differences_are_bold(tmp_path):
    values = {"base": np.full(10, 0.25), "tuned": np.full(10, 0.75)}
    models = {model: {"facts": v} for model, v in values.items()}
    table = MetricTable(models, [f"prompt {i}" for i in range(10)], units=FACTS)
    text = write_report(tmp_path / "report.html", title="T", lead="L", table=table).read_text()
    cell = '<span class="gain">+50.0</span> <span class="range">+50.0 to +50.0</span>'
    assert f'<td data-label="tuned - base">{cell}</td>' in text and "What became worse" not in text


def test_report_lists_significant_losses(tmp_path):
    models = {"base": {"facts": np.full(10, 0.75)}, "tuned": {"facts": np.full(10, 0.5)}}
    table = MetricTable(models, [f"prompt {i}" for i in range(10)], units=FACTS)
    text = write_report(tmp_path / "report.html", title="T", table=table).read_text()
    assert "What became worse" in text and '<span class="loss">-25.0</span>' in text


def test_report_summary_compares_with_base_without_neighbours(tmp_path):
    models = {name: {"facts": np.full(10, value)} for name, value in (("base", 0.5), ("a", 0.75), ("b", 0.625))}
    for neighbours, loss in ((True, "b - a"), (False, None)):
        table = MetricTable(models, [f"prompt {i}" for i in range(10)], units=FACTS, neighbours=neighbours)
        text = write_report(tmp_path / "report.html", title="T", table=table).read_text()
        assert re.findall(r">against (\w+)<", text) == ["base", "a" if neighbours else "base"]
        losses = re.findall(r"<li>.*\(([^)]*)\)</span></li>", text)
        assert losses == ([loss] if loss else [])


def test_report_shows_curves_configs_times_and_versions(page):
    text, parser = page
    words = "".join(parser.words)
    assert text.count('<polyline class="mean ') == 1 and "Constant: lr 0.5." in text
    assert re.search(r"/missing\.jsonl\b", text)
    assert "rank: 4\n" in words and "rate: 0.1" in words
    assert "12 s" in words and f"torch{version('torch')}" in words


def test_report_examples_beyond_the_budget_are_left_out(tmp_path):
    images = [Example([f"prompt {i}"], i, {"base": torch.rand(3, 32, 32)}) for i in range(4)]
    text = write_report(tmp_path / "report.html", title="T", examples=images, budget=8000).read_text()
    shown = text.count('<article class="example"')
    assert 0 < shown < 4 and f"{4 - shown} more prompts" in text


def test_report_without_table_shows_runs_together(tmp_path):
    for name, rewards in (("a", (0.1, 0.2)), ("b", (0.1, 0.3))):
        rows = [{"step": i, "reward": r, "monitor/reward": r / 2, "lr": 0.1 * i} for i, r in enumerate(rewards)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    logs = {name: tmp_path / f"{name}.jsonl" for name in "ab"}
    cells = [AblationCell("a", ["eta=0"], (1, 2)), AblationCell("b", [])]
    text = write_report(tmp_path / "report.html", title="T", logs=logs, cells=cells).read_text()
    reward, lr = re.findall(r'<figure class="chart">.*?</figure>', text)
    assert reward.count('class="mean ') == 4 and "b, held-out" in reward and lr.count('class="mean ') == 2
    assert text.index(reward) < text.index("More curves") < text.index(lr)
    assert "<code>eta=0</code>" in text and "1, 2" in text


def test_report_of_a_monitored_run(tmp_path):
    """Held-out metrics come first, breakdowns are one chart each, and costs are a sentence."""
    values = {"loss": 1.0, "monitor/facts": 0.5, "monitor/seconds": 3.0, "monitor/share_of_time": 0.25}
    values |= {f"monitor/facts/place/{i}": 0.1 * i for i in range(9)} | {"monitor/training/reward": 0.3}
    rows = [{"step": step, **{name: value + step for name, value in values.items()}} for step in (0, 5, 10)]
    rows[-1] |= {"monitor/seconds": 12.4, "monitor/share_of_time": 0.25}
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "checkpoint-000005").mkdir()
    (tmp_path / "best").symlink_to("checkpoint-000005")
    text = write_report(tmp_path / "r.html", title="T", logs={"run": tmp_path / "log.jsonl"}).read_text()
    figures = re.findall(r'<figure class="chart"><figcaption>([^<]*)', text)
    assert [title.strip() for title in figures] == [
        "fact accuracy, held-out",
        "loss",
        "fact accuracy/place (1 of 2), held-out",
        "fact accuracy/place (2 of 2), held-out",
        "reward in training, mean since the previous measurement",
    ]
    assert "Monitor: 3 measurements, 12 s, 25% of the time." in text
    assert "Best checkpoint: step 5, the dashed line." in text and text.count('class="mark"') == 4


def test_report_single_model_without_facts(tmp_path):
    table = MetricTable({"base": {"clip": np.array([0.1, 0.2])}}, ["a", "b"])
    example = Example(["a"], 0, {"base": torch.zeros(3, 4, 4)})
    path = write_report(tmp_path / "report.html", title="T", lead="L", table=table, examples=[example])
    text = path.read_text()
    assert "0.1500" in text and "Difference" not in text and "Chips" not in text


def test_non_defaults_keeps_part_names():
    assert non_defaults(Run()) == {}
    assert non_defaults(Run(trainer=Part(rank=4), rewards=(Part(),))) == {
        "trainer": {"name": "align", "rank": 4},
        "rewards": [{"name": "align"}],
    }


def test_read_log_repeated_step_uses_last_value(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": 2, "loss": 1.0, "note": "x"}, {"step": 4, "loss": 2.0}, {"step": 2, "loss": 3.0}]
    log.write_text("\n".join(map(json.dumps, rows)))
    log.write_text(log.read_text() + '\n{"step": 6, "lo')  # a run is just writing
    assert read_log(log) == {"loss": ([2, 4], [3.0, 2.0])}
    log.write_text('{"step": 6, "lo\n{"loss": 2}')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1 is not JSON"):
        read_log(log)
    log.write_text('\n{"loss": 2}')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 has no step"):
        read_log(log)


def test_machine_has_versions():
    assert {"system", "processor", "python", "longalign", "torch", "diffusers"} <= set(machine())


def rows(mean, spread=0.01, count=40):
    """Values with a given mean and a small spread."""
    return mean + spread * np.linspace(-1, 1, count)


def test_findings_gains_and_losses_against_previous_model():
    start = "facts/by_position/0-25%"
    shape, ground = "facts/attribute/shape", "facts/attribute/ground"
    noise = 0.2 * np.sin(np.arange(40))
    values = {
        "base": (rows(0.3), rows(0.9), rows(0.3), rows(0.9), rows(0.1, 0.001), rows(0.1, 0.001)),
        "segments": (rows(0.8), rows(0.7), rows(0.8), rows(0.9) + noise, rows(0.11, 0.001), rows(0.123, 0.001)),
        "reward": (rows(0.8) + noise, rows(0.7), rows(0.9), rows(0.8), rows(0.11, 0.001), rows(0.12, 0.001)),
    }
    names = ("facts", start, shape, ground, "text_relevant", "text_irrelevant")
    models = {model: dict(zip(names, columns, strict=True)) for model, columns in values.items()}
    table = MetricTable(models, [f"prompt {i}" for i in range(40)], units=FACTS)
    base, segments, reward = findings(table)
    assert base.startswith("base: fact accuracy 30.0% [29.8, 30.2]")
    assert "segments against base: fact accuracy 80.0%, +50.0 [+50.0, +50.0] points" in segments
    assert (
        "worse: position in the prompt 0-25% -20.0 [-20.0, -20.0]; better: shape;" in segments
        and "rises 2.3 times" in segments
    )
    assert "reward against segments: fact accuracy 80.6%" in reward and "no significant difference" in reward
    assert re.search(r"worse: ground -10\.\d \[-1\d\.\d, -\d\.\d\]; better: shape", reward)
    assert "text-irrelevant -0.0030" in reward and "rises" not in reward and "text-relevant" not in reward


def test_report_breakdown_differences(page):
    text, _ = page
    assert "<caption>fact accuracy, % by attribute</caption>" in text
