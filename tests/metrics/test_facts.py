from dataclasses import dataclass

import numpy as np
import pytest
import torch

from longalign.evaluation.measure import evaluate, measure
from longalign.metrics import FactMetric
from longalign.registry import data, metrics
from longalign.runtime import Runtime
from longalign.testing import check_metric


@dataclass
class Fact:
    kind: str
    place: str = ""


@dataclass
class Sentence:
    text: str
    facts: tuple


@dataclass
class Caption:
    sentences: tuple

    @property
    def text(self):
        return " ".join(s.text for s in self.sentences)


def test_fact_metric_overall_by_attribute_and_by_position(monkeypatch):
    shape, colour = Fact("shape", "left"), Fact("colour")
    sentences = [
        Sentence("A.", (shape, colour)),
        Sentence("B.", (colour,)),
        Sentence("C.", ()),
        Sentence("D.", (colour,)),
    ]
    long, short = Caption(tuple(sentences)), Caption((Sentence("E.", (colour,)),))
    truths = {long.text: [[True, False], [True], [], [True]], short.text: [[False]]}

    class Oracle:
        @staticmethod
        def verdicts(images, captions):
            assert images.dtype == np.float32 and images.shape[1:] == (3, 4, 4)
            return [truths[c.text] for c in captions]

    monkeypatch.setattr("longalign.metrics.facts.oracle", Oracle)
    values = measure(torch.zeros(2, 3, 4, 4), [long.text, short.text], [FactMetric([long, short])])
    assert values["facts"].tolist() == [0.75, 0.0]
    np.testing.assert_array_equal(values["facts/attribute/shape"], [1.0, np.nan])
    np.testing.assert_allclose(values["facts/attribute/colour"], [2 / 3, 0.0])
    np.testing.assert_array_equal(values["facts/by_position/0-25%"], [0.5, 0.0])
    np.testing.assert_array_equal(values["facts/by_position/25-50%"], [1.0, np.nan])
    np.testing.assert_array_equal(values["facts/by_position/75-100%"], [1.0, np.nan])
    assert "facts/by_position/50-75%" not in values
    np.testing.assert_array_equal(values["facts/place/left"], [1.0, np.nan])
    with pytest.raises(ValueError, match=r"facts.* 1 prompts.*'F\.'"):
        FactMetric([long]).observe(torch.zeros(1, 3, 4, 4), ["F."])


def test_fact_metric_on_true_and_shuffled_renders():
    from longalign.mini.captions import describe
    from longalign.mini.scenes import render_batch, sample_scene

    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, (6, 9)) for _ in range(8)]
    captions = [describe(scene, rng, words=150) for scene in scenes]
    prompts = [c.text for c in captions]
    images = torch.from_numpy(render_batch(scenes))
    metric = FactMetric(captions)
    table = evaluate({"true": images, "shuffled": images.roll(1, 0)}, prompts, [metric])
    assert table.interval("true", "facts").mean > 0.97
    assert table.interval("shuffled", "facts").mean < 0.6
    assert "facts/by_position/75-100%" in table.submetrics("facts")


SCENES = {"name": "scenes", "size": 6, "words": [20, 60]}


def test_facts_looks_prompts_up_in_data():
    scenes = data.build(SCENES, Runtime())
    metric = metrics.build({"name": "facts", "data": SCENES}, Runtime())
    images = torch.stack([scenes[i]["image"] for i in (4, 1)])
    values = measure(images, [scenes.prompt(4), scenes.prompt(1)], [metric])
    assert values["facts"].mean() > 0.9
    with pytest.raises(ValueError, match=r"1 prompts, e\.g\. 'A fox\.'.* 6 captions"):
        metric.observe(images[:1], ["A fox."])


def test_check_metric_facts():
    scenes = data.build(SCENES, Runtime())
    check_metric({"name": "facts", "data": SCENES}, prompts=[scenes.prompt(i) for i in (0, 3, 5)])


def test_facts_rejects_data_without_facts(tmp_path):
    (tmp_path / "prompts.txt").write_text("A fox.\n")
    with pytest.raises(ValueError, match=r"'prompts'.*`scenes`"):
        metrics.build({"name": "facts", "data": {"name": "prompts", "file": str(tmp_path / "prompts.txt")}}, Runtime())
