import numpy as np
import pytest
import torch

from longalign import registry
from longalign.data.scenes.config import ScenesConfig
from longalign.evaluation.measure import observe
from longalign.evaluation.sentences import (
    image_features,
    measure_sentences,
    sentence_metrics,
    truncated_sentences,
)
from longalign.metrics import FactMetric, RewardMetric
from longalign.rewards.base import Reward
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_clip


class Tower(Reward):
    """Scores a sentence by its number of words times the image's mean."""

    def forward(self, images, prompts):
        raise NotImplementedError

    def by_segment(self, images, prompts):
        return [
            [(text + ".", len(text.split()) * float(image.mean())) for text in prompt.split(".") if text]
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def image_features(self, images):
        return images.mean((1, 2, 3))[:, None]

    def text_features(self, prompts):
        return torch.tensor([[float(len(prompt.split()))] for prompt in prompts])


def test_measure_sentences_stores_by_segment():
    images = {"base": torch.zeros(2, 3, 4, 4), "tuned": torch.ones(2, 3, 4, 4)}
    measured = measure_sentences(images, ["A b. C.", "D e f."], reward=RewardMetric("tower", Tower()), batch_size=1)
    assert measured.texts == [["A b.", " C."], ["D e f."]]
    assert measured.scores == {"base": [[0.0, 0.0], [0.0]], "tuned": [[2.0, 1.0], [3.0]]}
    assert measured.score_name == "tower" and measured.verdicts == {}


def test_measure_sentences_of_scenes_has_facts_and_scores():
    data = ScenesConfig(size=3, seed=5).build(Runtime())
    captions = [data.scene(i)[1] for i in range(3)]
    facts = FactMetric(captions)
    images = torch.zeros(3, 3, 64, 64)
    texts = [caption.text for caption in captions]
    measured = measure_sentences({"base": images}, texts, facts, RewardMetric("tower", Tower()))
    assert measured.texts == [[s.text for s in caption.sentences] for caption in captions]
    accuracy = [np.mean([fact for s in image for fact in s]) for image in measured.verdicts["base"]]
    np.testing.assert_allclose(accuracy, facts.observe(images, texts)["facts"])
    assert [[len(s) for s in image] for image in measured.facts] == [
        [len(s) for s in image] for image in measured.verdicts["base"]
    ]
    assert [len(image) for image in measured.scores["base"]] == [len(image) for image in measured.texts]


@pytest.mark.parametrize("of_scenes", [True, False])
def test_image_tower_runs_once_for_table_and_sentences(tmp_path, of_scenes):
    data = ScenesConfig(size=3, seed=5).build(Runtime())
    captions = [data.scene(i)[1] for i in range(3)]
    texts = [caption.text for caption in captions]
    reward = registry.rewards.build({"name": "clip", "checkpoint": str(tiny_clip(tmp_path)), "text": "segments"})
    sizes = []
    embed_pixels = reward.towers.embed_pixels
    reward.towers.embed_pixels = lambda pixels: sizes.append(len(pixels)) or embed_pixels(pixels)
    facts = FactMetric(captions) if of_scenes else None
    metric = RewardMetric("clip", reward.eval(), segments=True)
    metrics = [m for m in (facts, metric) if m is not None]
    images = {"a": torch.rand(3, 3, 64, 64), "b": torch.rand(3, 3, 64, 64)}
    observed = {name: observe(rows, texts, metrics, 2) for name, rows in images.items()}
    assert sizes == [2, 1, 2, 1]
    shared = measure_sentences(images, texts, facts, metric, 2, image_features(metric, metrics, observed))
    assert len(sizes) == 4
    alone = measure_sentences(images, texts, facts, metric, 2)
    assert shared.texts == alone.texts and shared.verdicts == alone.verdicts
    for name in images:
        for row, expected in zip(shared.scores[name], alone.scores[name], strict=True):
            assert row == pytest.approx(expected, abs=1e-6)


def test_measure_sentences_without_metrics_is_empty():
    measured = measure_sentences({"base": torch.zeros(1, 3, 4, 4)}, ["A."])
    assert measured.scores == {} and measured.verdicts == {} and not measured.facts


def test_sentence_metrics_need_segments():
    facts, plain = FactMetric([]), RewardMetric("plain", Tower())
    segments = RewardMetric("tower", Tower(), segments=True)
    assert sentence_metrics([plain, segments, facts]) == (facts, segments)
    assert sentence_metrics([plain]) == (None, None)


@pytest.mark.parametrize(
    ("truncated", "indices"),
    [(" Three four. Five.", {1, 2}), ("four. Five.", {1, 2}), ("Five.", {2}), ("", set()), (None, set())],
)
def test_truncated_sentences(truncated, indices):
    assert truncated_sentences(["One two.", "Three four.", "Five."], truncated) == indices
