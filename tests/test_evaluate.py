import io
import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from longalign.evaluate import DecomposedMetric, FactMetric, RewardMetric, evaluate, measure, score_images
from longalign.rewards.base import EmbeddingReward, Reward, Scores


class Compass(EmbeddingReward):
    """Text features are unit vectors by name; an image points along the axis of its brightest channel."""

    texts: ClassVar = {
        "east": (0.8, 0.6, 0.0),
        "west": (0.8, -0.6, 0.0),
        "up": (0.8, 0.0, 0.6),
        "down": (0.8, 0.0, -0.6),
    }

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, prompts):
        return torch.tensor([self.texts[p] for p in prompts])


class Brightness(Reward):
    def scores(self, images, prompts):
        mean = images.mean((1, 2, 3))
        return Scores(mean, {"red": images[:, 0].mean((1, 2))})


def colours(*rgb):
    return torch.tensor(rgb, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4)


def test_the_parts_of_a_score_add_up_about_one_direction():
    # the mean of the four texts is (0.8, 0, 0), so the common direction is the first axis
    metric = DecomposedMetric("denscore", Compass(), ["east", "west", "up", "down", "down"])
    torch.testing.assert_close(metric.direction, torch.tensor([1.0, 0.0, 0.0]))
    images = colours((1, 0, 0), (0, 1, 0))
    found = metric(images, ["east", "east"])
    assert found["denscore"].tolist() == pytest.approx([0.8, 0.6])
    assert found["text_irrelevant"].tolist() == pytest.approx([0.8, 0.0])
    assert found["text_relevant"].tolist() == pytest.approx([0.0, 0.6])
    # across the direction "east" is (0, 0.6, 0), normalised (0, 1, 0)
    assert found["denscore-o"].tolist() == pytest.approx([0.0, 1.0])


def test_one_prompt_has_no_common_direction():
    with pytest.raises(ValueError, match="at least two different prompts, got 1"):
        DecomposedMetric("denscore", Compass(), ["east", "east"])
    with pytest.raises(ValueError, match="only embedding rewards decompose"):
        DecomposedMetric("bright", Brightness(), ["east", "west"])


def test_models_are_compared_on_the_same_rows_in_any_batch_size():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = ["east", "west", "up", "down", "east"]
    metrics = [RewardMetric("bright", Brightness()), DecomposedMetric("denscore", Compass(), prompts)]
    models = {"base": images, "tuned": images.flip(1)}
    table = evaluate(models, prompts, metrics, seeds=range(5), batch_size=2)
    whole = evaluate(models, prompts, metrics, seeds=range(5), batch_size=5)
    names = ["bright", "bright.red", "denscore", "text_relevant", "text_irrelevant", "denscore-o"]
    assert table.metrics == names
    for name in names:
        np.testing.assert_allclose(table.row("tuned", name), whole.row("tuned", name), rtol=1e-6)
    np.testing.assert_allclose(table.row("base", "bright"), images.mean((1, 2, 3)), rtol=1e-6)
    assert table.difference("tuned", "bright").mean == pytest.approx(0, abs=1e-6)


def test_a_plain_function_is_a_metric_and_names_must_differ():
    images = colours((1, 0, 0), (0, 0, 0))
    bright = RewardMetric("bright", lambda images, prompts: images.amax((1, 2, 3)))
    assert measure(images, ["a", "b"], [bright])["bright"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="two metrics are called bright"):
        measure(images, ["a", "b"], [bright, bright])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        measure(images, ["a"], [bright])


@dataclass
class Fact:
    kind: str


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


def test_facts_are_counted_overall_by_attribute_and_by_place(monkeypatch):
    shape, colour = Fact("shape"), Fact("colour")
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

    import longalign.mini

    monkeypatch.setitem(sys.modules, "longalign.mini.oracle", Oracle)
    monkeypatch.setattr(longalign.mini, "oracle", Oracle, raising=False)
    found = FactMetric([long, short])(torch.zeros(2, 3, 4, 4), [long.text, short.text])
    assert found["facts"].tolist() == [0.75, 0.0]
    np.testing.assert_array_equal(found["facts/attribute/shape"], [1.0, np.nan])
    np.testing.assert_allclose(found["facts/attribute/colour"], [2 / 3, 0.0])
    np.testing.assert_array_equal(found["facts/place in the prompt/0-25%"], [0.5, 0.0])
    np.testing.assert_array_equal(found["facts/place in the prompt/25-50%"], [1.0, np.nan])
    np.testing.assert_array_equal(found["facts/place in the prompt/75-100%"], [1.0, np.nan])
    assert "facts/place in the prompt/50-75%" not in found
    with pytest.raises(ValueError, match=r"no facts are known for 1 prompts, the first is 'F\.'"):
        FactMetric([long])(torch.zeros(1, 3, 4, 4), ["F."])


def test_true_renders_show_all_of_their_facts():
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
    assert "facts/place in the prompt/75-100%" in table.shares("facts")


def test_scores_of_files_are_printed_with_their_mean(tmp_path):
    for name, level in (("a.png", 51), ("b.png", 153)):
        Image.new("RGB", (4, 6 if name == "a.png" else 4), (level, level, level)).save(tmp_path / name)
    out = io.StringIO()
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    rows = score_images({"bright": Brightness(), "one": lambda images, prompts: torch.ones(1)}, paths, ["any"], out=out)
    assert rows[0]["bright"] == pytest.approx(0.2) and rows[1]["bright.red"] == pytest.approx(0.6)
    lines = [line.split("\t") for line in out.getvalue().splitlines()]
    assert lines[0] == ["bright", "bright.red", "one", "image"]
    assert lines[1] == ["0.2000", "0.2000", "1.0000", str(paths[0])]
    assert lines[-1] == ["0.4000", "0.4000", "1.0000", "mean of 2"]
    with pytest.raises(ValueError, match="got 3 for 2 images"):
        score_images({"bright": Brightness()}, paths, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no images"):
        score_images({"bright": Brightness()}, [], [])


def test_nothing_to_compare_is_not_a_number():
    found = evaluate({"base": torch.zeros(2, 3, 4, 4)}, ["a", "b"], [lambda images, prompts: {"none": [math.nan] * 2}])
    assert found.interval("base", "none").count == 0
